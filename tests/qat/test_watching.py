"""qat.watch: what goes wrong in a training is an error with the name of the quantizer; what is right is none."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fakequant
from fakequant import qat
from fakequant.errors import InvalidValueError, TrainingError
from fakequant.nn import QuantLinear

LEARNED = fakequant.QuantDescriptor(learn_amax="lsq")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6)


@pytest.fixture
def model(x) -> nn.Module:
    """Three layers; the range of the last one's input is learned."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule("4", input=LEARNED))
    fakequant.calibrate(model, [x], progress=False)
    return model.train()


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


# Planted faults, between the first and the second step.


def feed_nan(model, x):
    x[1, 2] = float("nan")


def feed_minus_inf(model, x):
    x[1, 2] = -float("inf")


def lose_a_weight(model, x):
    model[0].weight.data[1, 1] = float("nan")


def overflow_in_the_middle(model, x):
    model[2].bias.data.fill_(float("inf"))


def lose_a_range(model, x):
    model[2].weight_quantizer._amax[1] = float("nan")


def grow_a_range(model, x):
    model[2].input_quantizer._amax.mul_(2000)


def grow_one_channel(model, x):
    model[2].weight_quantizer._amax[3].mul_(2000)


def collapse_a_learned_range(model, x):
    model[4].input_quantizer._amax.data.div_(-1e5)
    model[4].input_quantizer._amax.register_hook(torch.zeros_like)


def lose_a_gradient(model, x):
    model[4].input_quantizer._amax.register_hook(lambda grad: grad * float("nan"))


FAULTS = {
    feed_nan: "\n  0._input_quantizer: expected finite inputs, got nan (so did 2 quantizers behind it)",
    feed_minus_inf: "\n  0._input_quantizer: expected finite inputs, got inf",
    lose_a_weight: "\n  2._input_quantizer: expected finite inputs, got nan (so did 1 quantizers behind it)",
    overflow_in_the_middle: "\n  4._input_quantizer: expected finite inputs, got inf (so did 0 quantizers behind it)",
    lose_a_range: "\n  2._weight_quantizer: expected amax within a factor 1024 of ",
    grow_a_range: "\n  2._input_quantizer: expected amax within a factor 1024 of ",
    grow_one_channel: "\n  2._weight_quantizer: expected amax within a factor 1024 of ",
    collapse_a_learned_range: "\n  4._input_quantizer: expected amax within a factor 1024 of ",
    lose_a_gradient: "\n  4._input_quantizer: expected amax within a factor 1024 of ",
}
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


@every_fault
def test_a_fault_is_named_after_the_step_of_the_optimizer(model, x, fault):
    optimizer = sgd(model)
    with qat.watch(model, optimizer) as watching:
        train(model, x, optimizer)
        fault(model, x)
        with pytest.raises(TrainingError) as error:
            train(model, x, optimizer)
    assert watching.steps == 2
    assert str(error.value).startswith("step 2:\n")
    assert FAULTS[fault] in str(error.value)


@every_fault
def test_a_fault_is_named_in_a_compiled_model(model, x, fault):
    optimizer = sgd(model)
    with qat.watch(model, optimizer):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        train(compiled, x, optimizer)
        fault(model, x)
        with pytest.raises(TrainingError) as error:
            train(compiled, x, optimizer)
    assert FAULTS[fault] in str(error.value)


def test_a_runaway_range_is_given_with_its_start(model, x):
    model[2].input_quantizer.amax = 0.5
    watching = qat.watch(model)
    model(x)
    model[2].input_quantizer.amax = 600.0
    with pytest.raises(TrainingError, match=r"2\._input_quantizer: .* of 0\.5, where it started, got 600\. Lower"):
        watching.step()


def test_a_lost_gradient_is_given_as_the_reason(model, x):
    optimizer = sgd(model)
    lose_a_gradient(model, x)
    with qat.watch(model, optimizer), pytest.raises(TrainingError, match="got nan; its gradient is not finite"):
        train(model, x, optimizer)


def test_parameters_that_are_lost_are_named(model, x):
    watching = qat.watch(model)
    lose_a_weight(model, x)
    model(x)
    with pytest.raises(TrainingError, match=r"parameters that are not finite: 0\.weight$"):
        watching.step()


def test_the_lower_end_of_an_affine_range_is_watched(x):
    layer = QuantLinear(6, 2, quant_desc_input=fakequant.QuantDescriptor(affine=True, unsigned=True))
    layer.input_quantizer.set_range(1.0, -0.5)
    watching = qat.watch(layer)
    layer(x)
    layer.input_quantizer.set_range(1.0, -1000.0)
    with pytest.raises(TrainingError, match=r"_input_quantizer: expected amin within a factor 1024 of -0\.5"):
        watching.step()


@pytest.mark.parametrize(("factor", "is_caught"), [(1.5, True), (2.5, False)])
@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_the_factor_bounds_a_range_on_both_sides(model, x, factor, is_caught, ratio):
    watching = qat.watch(model, factor=factor)
    model(x)
    model[2].input_quantizer._amax.mul_(ratio)
    if is_caught:
        with pytest.raises(TrainingError, match="2._input_quantizer"):
            watching.step()
    else:
        watching.step()


# No false alarm.


def test_an_ordinary_training_is_left_alone(model, x):
    watched = copy.deepcopy(model)
    train(model, x, sgd(model), steps=5)
    optimizer = sgd(watched)
    with qat.watch(watched, optimizer) as watching:
        train(watched, x, optimizer, steps=5)
    assert watching.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), watched.parameters(), strict=True))


def test_largest_finite_values_are_finite(x):
    layer = QuantLinear(6, 2)
    watching = qat.watch(layer)
    layer(torch.full_like(x, torch.finfo(torch.float32).min))
    watching.step()


def test_evaluation_is_not_watched(model, x):
    watching = qat.watch(model)
    model(x)
    with torch.no_grad():
        model(x * float("nan"))
    watching.step()


def test_a_step_that_a_scaler_leaves_out_is_no_step(model, x):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with qat.watch(model, optimizer) as watching:
        for overflows in (True, False):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            scaler.scale(loss * float("inf") if overflows else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watching.steps == 1


def test_a_range_that_was_zero_may_become_any(model, x):
    model[2].input_quantizer.amax = 0.0
    watching = qat.watch(model)
    model(x)
    model[2].input_quantizer.amax = 5.0
    watching.step()


def test_a_learned_range_may_change_its_sign(model, x):
    """Only its magnitude counts."""
    watching = qat.watch(model)
    model(x)
    model[4].input_quantizer._amax.data.neg_()
    watching.step()


def test_a_range_of_another_shape_starts_anew(model, x):
    watching = qat.watch(model)
    model[2].weight_quantizer.amax = None
    model[2].weight_quantizer.amax = 1e4
    model(x)
    watching.step()


def test_an_export_in_between_is_not_watched(model, x):
    watching = qat.watch(model)
    model(x)
    torch.export.export(model, (x,))
    watching.step()


def test_a_range_that_comes_later_starts_then(x):
    layer = QuantLinear(6, 2).train()
    qat.follow_ranges(layer, momentum=1.0)
    watching = qat.watch(layer, factor=10.0)
    layer(x)
    watching.step()
    layer(100 * x)
    with pytest.raises(TrainingError, match="step 2:\n  _input_quantizer: expected amax within a factor 10 of"):
        watching.step()


def test_steps_of_several_batches_are_watched_as_one(model, x):
    watching = qat.watch(model)
    model(x * float("nan"))
    model(x)
    with pytest.raises(TrainingError, match=r"0\._input_quantizer: expected finite inputs"):
        watching.step()


def test_an_error_is_not_repeated(model, x):
    watching = qat.watch(model)
    model(x * float("nan"))
    with pytest.raises(TrainingError):
        watching.step()
    model(x)
    watching.step()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_watched(model, x, use_reentrant):
    watching = qat.watch(model)
    model[0].weight.data.fill_(float("nan"))
    checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    with pytest.raises(TrainingError, match=r"2\._input_quantizer: expected finite inputs"):
        watching.step()


# A model that is watched is an ordinary one.


def test_batches_of_a_step_do_not_compile_anew(model, x):
    watching = qat.watch(model)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = []
    for _ in range(3):
        for _ in range(3):
            compiled(x).sum().backward()
        watching.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] <= 3


def test_nothing_is_read_back_in_the_forward_pass(model, x):
    """Tensors on the meta device have no values to read."""
    qat.watch(model.to("meta"))
    model(x.to("meta")).sum().backward()


def test_state_dict_is_as_without(model):
    keys = list(model.state_dict())
    qat.watch(model)
    assert list(model.state_dict()) == keys


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_not_watched(model, x, copied):
    watching = qat.watch(model)
    model(x)
    COPIES[copied](model)(x * float("nan"))
    watching.step()


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_holds_nothing_that_was_met(model, x, copied):
    watching = qat.watch(model)
    size = len(pickle.dumps(COPIES[copied](model)))
    model(x)
    watching.step()
    model(x)
    assert len(pickle.dumps(COPIES[copied](model))) == size


def test_remove_takes_every_hook_away(model, x):
    optimizer = sgd(model)
    before = pickle.dumps(model)
    with qat.watch(model, optimizer) as watching:
        pass
    assert pickle.dumps(model) == before
    train(model, x * float("nan"), optimizer)
    assert watching.steps == 0


# What is refused.


def test_a_model_that_did_not_run_is_an_error(model, x):
    watching = qat.watch(model)
    copy.deepcopy(model)(x)
    with pytest.raises(TrainingError, match="step 1: expected the watched model to have run with gradient"):
        watching.step()


def test_a_model_that_was_compiled_before_is_an_error(model, x):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    watching = qat.watch(model)
    compiled(x)
    with pytest.raises(TrainingError, match="before it is compiled by its first call"):
        watching.step()


def test_a_model_with_quantized_weights_only_needs_no_calls():
    layer = QuantLinear(2, 2)
    layer.input_quantizer.disable()
    del layer._modules["_input_quantizer"]
    layer.weight_quantizer.amax = torch.ones(2, 1)
    watching = qat.watch(layer)
    watching.step()
    layer.weight_quantizer._amax[0] = 1e-9
    with pytest.raises(TrainingError, match="_weight_quantizer: expected amax within"):
        watching.step()


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_a_factor_that_bounds_nothing_is_refused(model, factor):
    with pytest.raises(InvalidValueError, match="factor: expected a (finite )?number above 1"):
        qat.watch(model, factor=factor)


def test_a_float_model_is_refused():
    with pytest.raises(InvalidValueError, match="expected a quantized model, got no quantizer in Linear"):
        qat.watch(nn.Linear(2, 2))
