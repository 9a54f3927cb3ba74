"""One calibrated model, several targets."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.call_sites import call_sites
from fakequant.nn.walk import named_quantizers
from fakequant.retarget import targeted

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A small convolution, a residual add, a pool, a transposed convolution, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 6, 3, padding=1)
        self.stem = nn.Conv2d(6, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(F.relu(self.small(x)))))
        x = F.relu(self.conv(x) + x)
        x = F.gelu(self.up(F.gelu(self.last(self.pool(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net().eval()
    fq.quantize(model, example_inputs=X, target="tensorrt")
    fq.calibrate(model, [X], progress=False)
    return model


def state(model):
    return (
        [type(module) for module in model.modules()],
        [(name, q.descriptor, q.is_enabled) for name, q in named_quantizers(model)],
        [(name, site.stand_by) for name, site in call_sites(model)],
    )


def in_use(model):
    return {name for name, quantizer in named_quantizers(model) if quantizer.is_enabled}


def test_one_calibration_gives_every_quantizer_a_range(model):
    assert all(quantizer.amax is not None for _, quantizer in named_quantizers(model))


def test_each_target_uses_other_quantizers(model):
    before = in_use(model)
    fq.retarget(model, "onnxruntime")
    added = {"_call_sites.add_0.input", "_call_sites.gelu_0.input", "small._weight_quantizer", "small._input_quantizer"}
    assert in_use(model) - before == added
    assert before - in_use(model) == {"up._input_quantizer", "up._weight_quantizer", "_call_sites.mean_0.input"}


def test_there_and_back_changes_nothing(model):
    before, expected = state(model), model(X)
    fq.retarget(model, "onnxruntime")
    fq.retarget(model, "tensorrt")
    assert state(model) == before
    assert torch.equal(model(X), expected)


def test_the_convolutions_side_of_an_add_is_quantized_for_onnxruntime_only(model):
    (site,) = [site for name, site in call_sites(model) if name == "add_0"]
    assert site.in_use == [site.other]
    fq.retarget(model, "onnxruntime")
    assert set(site.in_use) == {site.input, site.other}


@pytest.mark.parametrize(
    ("name", "tensorrt", "onnxruntime"),
    [
        ("small", nn.Conv2d, fq.nn.QuantConv2d),
        ("conv", fq.nn.QuantConv2d, fq.nn.QuantConv2d),
        ("pool", nn.MaxPool2d, fq.nn.QuantMaxPool2d),
        ("up", fq.nn.QuantConvTranspose2d, nn.ConvTranspose2d),
    ],
)
def test_a_layer_is_float_where_a_target_wants_it_so(model, name, tensorrt, onnxruntime):
    layer = model.get_submodule(name)
    assert type(layer) is tensorrt
    fq.retarget(model, "onnxruntime")
    assert type(layer) is onnxruntime


def test_a_float_layer_is_bit_identical_to_torchs(model):
    x = torch.rand(1, 3, 8, 8)
    torch.manual_seed(0)
    assert torch.equal(model.small(x), Net().small(x))


def test_codes_of_what_is_never_negative_start_at_0_for_onnxruntime(model):
    quantizer = model.conv.input_quantizer
    assert (quantizer.unsigned, quantizer.maxbound) == (False, 127)
    fq.retarget(model, "onnxruntime")
    assert (quantizer.unsigned, quantizer.maxbound) == (True, 255)
    assert quantizer.scale == quantizer.amax / 255


def test_codes_of_what_may_be_negative_do_not(model):
    fq.retarget(model, "onnxruntime")
    assert not model.fc.input_quantizer.unsigned


def test_the_state_dict_is_the_same_for_every_target(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fq.retarget(model, "onnxruntime")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_copy_has_the_same_target(model, copied, target):
    fq.retarget(model, target)
    other = copied(model)
    assert state(other) == state(model)
    assert torch.equal(other(X), model(X))
    fq.retarget(other, "onnxruntime")
    fq.retarget(model, "onnxruntime")
    assert torch.equal(other(X), model(X))


def test_a_block_restores_the_target_after_an_error(model):
    before = state(model)
    with pytest.raises(ZeroDivisionError), targeted(model, "onnxruntime"):
        _ = 1 / 0
    assert state(model) == before


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_export_and_validation_leave_the_target(model, target, tmp_path):
    before, expected = state(model), model(X)
    fq.export_onnx(model, (X,), tmp_path / "m.onnx", target=target)
    fq.validate_onnx(tmp_path / "m.onnx", model, [X])
    assert state(model) == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("trained", [False, True], ids=["calibrated", "trained"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_one_model_is_exported_exactly_for_each_target(model, target, trained, tmp_path):
    if trained:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        model(X).square().mean().backward()
        optimizer.step()
        model.eval()
    report = fq.export_onnx(model, (X,), tmp_path / "m.onnx", target=target)
    assert report.not_in_file == ()
    found = fq.validate_onnx(tmp_path / "m.onnx", model, [X])
    assert found.simulated.max_steps <= 1
    assert found.optimized.max_steps <= 2


def test_dequantize_gives_the_float_model_back_whatever_the_target(model):
    torch.manual_seed(0)
    expected = Net().eval()
    fq.dequantize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.equal(model(X), expected(X))


def test_quantizing_for_the_other_target_first_gives_the_same(model):
    torch.manual_seed(0)
    other = Net().eval()
    fq.quantize(other, example_inputs=X, target="onnxruntime")
    fq.calibrate(other, [X], progress=False)
    for target in ("tensorrt", "onnxruntime"):
        fq.retarget(model, target)
        fq.retarget(other, target)
        assert torch.equal(other(X), model(X))


def test_quantizers_that_stand_by_say_so(model):
    assert "stands by" in str(model.small._input_quantizer)


def test_unknown_target(model):
    with pytest.raises(
        fq.InvalidValueError,
        match=r"target: expected one of \['onnxruntime', 'onnxruntime-cuda', 'tensorrt', 'tensorrt-ep'\], got 'tpu'",
    ):
        fq.retarget(model, "tpu")


def test_a_model_without_placement_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    fq.quantize(model)
    before = state(model)
    fq.retarget(model, "onnxruntime")
    assert state(model) == before


@pytest.mark.parametrize("operand", ["input", "weight"])
def test_a_rule_for_one_target_is_about_a_whole_layer(operand):
    recipe = fq.preset("int8") + fq.Rule("conv", target="onnxruntime", **{operand: None})
    with pytest.raises(fq.RecipeError, match=r"^conv: expected rules that leave the layer as a whole"):
        fq.quantize(Net().eval(), recipe, example_inputs=X)


def test_a_rule_for_one_target_leaves_the_other_alone():
    model = Net().eval()
    recipe = fq.preset("int8") + fq.Rule("conv", target="onnxruntime", input=None, weight=None)
    fq.quantize(model, recipe, example_inputs=X)
    assert type(model.conv) is fq.nn.QuantConv2d
    fq.retarget(model, "onnxruntime")
    assert type(model.conv) is nn.Conv2d


class Doubled(fq.nn.QuantLinear):
    """A user's own quantized class."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_quantized_class_of_a_user_keeps_its_class_for_every_target():
    torch.manual_seed(0)
    model, x = nn.Sequential(Doubled(8, 8)), torch.randn(4, 8)
    expected = 2 * nn.functional.linear(x, model[0].weight, model[0].bias)
    recipe = fq.preset("int8") + fq.Rule("0", target="tensorrt", input=None, weight=None)
    fq.quantize(model, recipe, example_inputs=(x,), target="onnxruntime")
    fq.calibrate(model, [x], progress=False)
    quantized = model(x)
    fq.retarget(model, "tensorrt")
    assert torch.equal(model(x), expected)
    fq.retarget(model, "onnxruntime")
    assert type(model[0]) is Doubled
    assert torch.equal(model(x), quantized)
    assert not torch.equal(quantized, expected)


def test_a_quantized_class_of_a_user_stays_when_the_model_is_made_float():
    model = nn.Sequential(Doubled(2, 2), nn.Linear(2, 2))
    fq.quantize(model)
    fq.dequantize(model)
    assert [type(layer) for layer in model] == [Doubled, nn.Linear]
