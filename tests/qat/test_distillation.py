import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fakequant
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.qat import Distillation, float_teacher


class Net(nn.Module):
    """Two convolutions and a head; what it returns is wrapped by a function."""

    def __init__(self, wrap=lambda logits: logits) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4 * 4 * 4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor):
        x = self.second(self.norm(self.first(x)).relu())
        return self.wrap(self.head(x.relu().flatten(1)))


class Fixed(nn.Module):
    """Returns a parameter, whatever comes in."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.feature = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.feature(self.value)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 1, 8, 8)


def quantized(x: Tensor, model: nn.Module) -> nn.Module:
    four_bits = fakequant.QuantDescriptor(4)
    rules = [fakequant.Rule(type=kind, input=four_bits, weight=four_bits) for kind in ("Conv2d", "Linear")]
    fakequant.quantize(model, fakequant.preset("int8") + rules[0] + rules[1])
    fakequant.calibrate(model, [x], progress=False)
    return model.train()


@pytest.fixture
def student(x) -> nn.Module:
    return quantized(x, Net())


def divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> float:
    """Hinton et al. 2015 in float64: T**2 times the mean of sum p log(p / q)."""
    s, t = (v.detach().double().numpy() / temperature for v in (student, teacher))
    q, p = (np.exp(v) / np.exp(v).sum(axis, keepdims=True) for v in (s, t))
    return float((p * np.log(p / q)).sum(axis).mean() * temperature**2)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


# The distance.


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("shape", "class_dim"), [((5, 3), -1), ((2, 3, 4, 4), 1), ((2, 7, 3), -1)])
def test_distance_of_logits_is_hintons(temperature, shape, class_dim):
    one, other = 3 * torch.randn(shape), 3 * torch.randn(shape)
    _, distance = Distillation(Fixed(other), temperature=temperature, class_dim=class_dim)(Fixed(one), None)
    assert distance.item() == pytest.approx(divergence(one, other, temperature, class_dim), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_distance_of_features_is_in_units_of_the_teachers_power(weight):
    one, other = torch.randn(2, 3), 100 * torch.randn(2, 3)
    _, distance = Distillation(Fixed(other), features=["feature"], feature_weight=weight, logits=None)(Fixed(one), None)
    expected = weight * ((one - other).square().sum() / other.square().sum()).item()
    assert distance.item() == pytest.approx(expected, rel=1e-5)


def test_distance_of_several_features_is_their_mean(student, x):
    def of(*names: str) -> float:
        return Distillation(float_teacher(student), features=names, logits=None)(student.eval(), x)[1].item()

    assert of("first", "second", "head") == pytest.approx((of("first") + of("second") + of("head")) / 3, rel=1e-5)


def test_logits_and_features_are_summed(student, x):
    teacher = float_teacher(student)
    student.eval()
    logits = Distillation(teacher)(student, x)[1]
    features = Distillation(teacher, features=["second"], logits=None)(student, x)[1]
    both = Distillation(teacher, features=["second"], feature_weight=3.0)(student, x)[1]
    torch.testing.assert_close(both, logits + 3 * features)


def test_every_call_of_a_module_counts():
    class Twice(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return self.feature(self.value) + self.feature(self.value + 1)

    one, other = torch.randn(4), torch.randn(4)
    _, distance = Distillation(Twice(other), features=["feature"], logits=None)(Twice(one), None)
    expected = 2 * (one - other).square().sum() / (other.square().sum() + (other + 1).square().sum())
    assert distance.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_feature_of_several_tensors_is_one(x):
    lstm = nn.LSTM(8, 4)
    scaled = nn.LSTM(8, 4)
    scaled.load_state_dict({name: 1.5 * value for name, value in lstm.state_dict().items()})
    _, distance = Distillation(nn.Sequential(lstm), features=["0"], logits=None)(nn.Sequential(scaled), x[:, 0])
    ours, theirs = ([y, *state] for y, state in (scaled(x[:, 0]), lstm(x[:, 0])))
    noise = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    assert distance.item() == pytest.approx((noise / sum(b.square().sum() for b in theirs)).item(), rel=1e-5)


def test_a_feature_that_is_zero_in_the_teacher_gives_a_finite_distance():
    distillation = Distillation(Fixed(torch.zeros(3)), features=["feature"], logits=None)
    assert distillation(Fixed(torch.ones(3)), None)[1].isfinite()


def test_distance_of_half_logits_is_computed_in_float32():
    one, other = torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    _, distance = Distillation(Fixed(other))(Fixed(one), None)
    assert distance.item() == pytest.approx(divergence(one, other, 1.0, -1), rel=1e-5)


def test_distance_is_float32_under_autocast(student, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, distance = Distillation(float_teacher(student), features=["second"])(student, x)
    assert (output.dtype, distance.dtype) == (torch.bfloat16, torch.float32)


# The two models.


def test_a_float_teacher_is_the_float_model(x):
    model = Net()
    expected = model.eval()(x)
    assert torch.equal(float_teacher(quantized(x, model))(x), expected)


def test_a_float_teacher_is_frozen_and_apart(student):
    teacher = float_teacher(student)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert next(iter(student.parameters())).requires_grad


def test_the_teacher_never_moves(student, x):
    teacher = Net().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    Distillation(teacher, features=["second"])(student, x)[1].backward()
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_goes_to_the_students_device(student, x):
    teacher = float_teacher(student)
    output, distance = Distillation(teacher)(student.to("meta"), x.to("meta"))
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    assert (output.device.type, distance.device.type) == ("meta", "meta")


def test_the_output_is_the_students(student, x):
    student.eval()
    assert torch.equal(Distillation(float_teacher(student))(student, x)[0], student(x))


def test_training_brings_the_student_nearer(student, x):
    distillation = Distillation(float_teacher(student), features=["second"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    distances = []
    for _ in range(15):
        distance = distillation(student, x)[1]
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < 0.5 * distances[0]


def test_a_second_call_knows_nothing_of_the_first(student, x):
    distillation = Distillation(float_teacher(student), features=["second"])
    student.eval()
    first = distillation(student, x)[1]
    distillation(student, 2 * x)
    assert torch.equal(distillation(student, x)[1], first)


WRAPPERS = {
    "dict": lambda logits: {"logits": logits, "hidden": logits + 1},
    "attribute": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_logits_are_found_in_an_output(x, wrapper):
    student = quantized(x, Net(WRAPPERS[wrapper])).eval()
    distance = Distillation(float_teacher(student))(student, x)[1]
    student.wrap = lambda logits: logits
    plain = Distillation(float_teacher(student))(student, x)[1]
    assert torch.equal(distance, plain)


def test_an_output_of_another_kind_is_refused(x):
    model = Net(lambda logits: [logits])
    with pytest.raises(InvalidTypeError, match="expected a tensor or one with logits, got list"):
        Distillation(Net(model.wrap))(model, x)


def test_a_function_finds_the_logits_of_another_kind(x):
    model = Net(lambda logits: [logits])
    distance = Distillation(Net(model.wrap), logits=lambda output: output[0])(model, x)[1]
    assert distance > 0


# Inside of trainers.


@pytest.mark.parametrize("fails", [False, True], ids=["returned", "raised"])
def test_nothing_stays_in_the_student(student, x, fails):
    before = len(pickle.dumps(student.first))
    distillation = Distillation(float_teacher(student), features=["first"])
    if fails:
        with pytest.raises(RuntimeError):
            distillation(student, x[..., :4])
    else:
        distillation(student, x)
    assert len(pickle.dumps(student.first)) == before


def test_a_distributed_student_has_the_same_gradients(student, x, process_group):
    distillation = Distillation(float_teacher(student), features=["second"])
    distillation(student, x)[1].backward()
    alone = gradients(student)
    distillation(DistributedDataParallel(student), x)[1].backward()
    assert all(torch.equal(a, b) for a, b in zip(alone, gradients(student), strict=True))


def test_a_compiled_student_gives_the_same_distance(student, x):
    distillation = Distillation(float_teacher(student.eval()))
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(distillation(compiled, x)[1], distillation(student, x)[1])


def test_features_of_a_compiled_student_are_refused(student, x):
    with pytest.raises(InvalidValueError, match="expected a module that is not compiled"):
        Distillation(float_teacher(student), features=["first"])(torch.compile(student), x)


class Checkpointed(Net):
    """Keeps no activations of the convolutions."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: self.second(self.first(x).relu()), x, use_reentrant=self.use_reentrant)
        return self.head(x.flatten(1))


def test_a_checkpoint_does_not_change_the_gradients(x):
    student = quantized(x, Checkpointed())
    distillation = Distillation(float_teacher(student), features=["second"])
    distillation(student, x)[1].backward()
    found = gradients(student)
    plain = lambda x: student.head(student.second(student.first(x).relu()).flatten(1))  # noqa: E731
    student.forward = plain
    distillation(student, x)[1].backward()
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(student), strict=True))


def test_a_feature_without_gradient_is_refused(x):
    student = quantized(x, Net())
    student.first.requires_grad_(False)
    with pytest.raises(InvalidValueError, match="first: expected an output with gradient"):
        Distillation(float_teacher(student), features=["first"])(student, x)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a (finite )?number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a (finite )?number above 0, got nan"),
        ({"feature_weight": -1}, "feature_weight: expected a (finite )?number above 0, got -1"),
        ({"logits": None}, "expected names of modules beside logits=None"),
        ({"features": ["third"]}, "names of modules of the teacher: .*`third`"),
    ],
    ids=["temperature", "NaN", "weight", "nothing", "name"],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        Distillation(Net(), **arguments)


def test_a_student_without_the_feature_is_refused(x):
    teacher = Net()
    teacher.extra = nn.Identity()
    with pytest.raises(InvalidValueError, match="names of modules of the student: .*`extra`"):
        Distillation(teacher, features=["extra"])(Net(), x)


def test_a_student_of_the_teachers_parameters_is_refused(student, x):
    with pytest.raises(InvalidValueError, match=r"student: expected parameters of its own, got first\.weight"):
        Distillation(student)(student, x)


def test_a_feature_of_another_shape_is_refused():
    with pytest.raises(InvalidValueError, match=r"feature: expected outputs of shapes \[\(3,\)\], got \[\(2,\)\]"):
        Distillation(Fixed(torch.ones(3)), features=["feature"], logits=None)(Fixed(torch.ones(2)), None)


def test_a_feature_that_does_not_run_is_refused():
    class Idle(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return self.value

    with pytest.raises(InvalidValueError, match=r"feature: expected outputs of shapes some, got none"):
        Distillation(Idle(torch.ones(3)), features=["feature"])(Idle(torch.ones(3)), None)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(InvalidValueError, match=r"logits: expected shape \(3,\), got \(2,\)"):
        Distillation(Fixed(torch.ones(3)))(Fixed(torch.ones(2)), None)
