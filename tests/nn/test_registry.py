import contextlib

import pytest
import torch
from torch import Tensor, nn

import fakequant
from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError, RecipeError
from fakequant.nn import (
    QuantInputMixin,
    QuantLinear,
    QuantMixin,
    TensorQuantizer,
    quantized_class_of,
    register,
    registered,
    registry,
)
from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.walk import named_quantizers


class Scaled(nn.Linear):
    """A user's layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class QuantScaled(QuantMixin, Scaled):
    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def forward(self, input: Tensor) -> Tensor:
        return 3 * nn.functional.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)


class QuantPixelShuffle(QuantizedInputForward, nn.PixelShuffle):
    """Two lines are a quantized module."""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Forget afterwards what a test registered."""
    monkeypatch.setattr(registry, "_QUANTIZED", dict(registry._QUANTIZED))


def test_register_returns_the_class():
    assert register(Scaled)(QuantScaled) is QuantScaled


def test_registered_class_is_found():
    register(Scaled)(QuantScaled)
    assert quantized_class_of(Scaled) is QuantScaled
    assert (Scaled, QuantScaled) in list(registered())


def test_registered_class_knows_its_float_class():
    register(Scaled)(QuantScaled)
    assert QuantScaled.float_class is Scaled


def test_look_up_is_by_exact_type():
    assert quantized_class_of(Scaled) is None


def test_model_with_a_registered_class_is_quantized():
    register(Scaled)(QuantScaled)
    model = nn.Sequential(Scaled(4, 2))
    report = fakequant.quantize(model)
    assert str(report) == "1 of 1 Scaled quantized"
    assert type(model[0]) is QuantScaled


def test_registered_class_keeps_its_own_forward():
    register(Scaled)(QuantScaled)
    model, x = nn.Sequential(Scaled(4, 2)), torch.randn(8, 4)
    expected = model(x)
    fakequant.quantize(model)
    step = model[0].weight.abs().max() / 127 + x.abs().max() / 127
    assert (model(x) - expected).abs().max() < 3 * 4 * step


def test_registered_class_is_calibrated_and_dequantized():
    register(Scaled)(QuantScaled)
    model = nn.Sequential(Scaled(4, 2))
    fakequant.quantize(model)
    fakequant.calibrate(model, [torch.randn(8, 4)], progress=False)
    assert type(fakequant.dequantize(model)[0]) is Scaled


def test_class_without_weight_needs_a_rule():
    register(nn.PixelShuffle)(QuantPixelShuffle)
    model = nn.Sequential(nn.PixelShuffle(2))
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule(type="PixelShuffle"))
    assert type(model[0]) is QuantPixelShuffle


def test_user_class_with_the_name_of_torchs_is_not_patched_into_torch_nn():
    class Conv2d(nn.Module):
        """Another Conv2d."""

    class QuantOther(QuantizedInputForward, Conv2d):
        """Its quantized class."""

    register(Conv2d)(QuantOther)
    with fakequant.patched_torch_nn():
        assert nn.Conv2d is fakequant.nn.QuantConv2d


def test_new_class_of_torch_is_patched():
    register(nn.PixelShuffle)(QuantPixelShuffle)
    with fakequant.patched_torch_nn():
        assert nn.PixelShuffle is QuantPixelShuffle
    assert nn.PixelShuffle is QuantPixelShuffle.float_class


def test_class_that_is_not_by_default_is_not_patched():
    register(nn.PixelShuffle, by_default=False)(QuantPixelShuffle)
    with fakequant.patched_torch_nn():
        assert nn.PixelShuffle is QuantPixelShuffle.float_class


def test_weighted_class_that_is_not_by_default_waits_for_a_rule():
    register(Scaled, by_default=False)(QuantScaled)
    model = nn.Sequential(Scaled(4, 2), nn.Linear(2, 2))
    fakequant.quantize(model)
    assert type(model[0]) is Scaled


@pytest.mark.parametrize(
    ("rule", "quantized"),
    [
        (fakequant.Rule(type="PixelShuffle"), True),
        (fakequant.Rule("0", type="Pixel*"), True),
        (fakequant.Rule("1", type="Pixel*"), False),
        (fakequant.Rule("*"), False),
        (fakequant.Rule(type="PixelShuffle", input=None, weight=None), False),
    ],
    ids=["type", "name and type", "another name", "any type", "float"],
)
@pytest.mark.parametrize("example", [None, (torch.rand(1, 4, 2, 2),)], ids=["no example", "example"])
def test_class_on_request_is_quantized_by_rules_that_name_its_type(rule, quantized, example):
    registry.register_on_request(nn.PixelShuffle)(QuantPixelShuffle)
    model = nn.Sequential(nn.PixelShuffle(2), nn.PixelShuffle(1), nn.Conv2d(1, 1, 1))
    with contextlib.suppress(RecipeError):  # a rule that matches nothing
        fakequant.quantize(model, fakequant.preset("int8") + rule, example_inputs=example)
    assert (type(model[0]) is QuantPixelShuffle) == quantized


@pytest.mark.parametrize(
    ("float_class", "bases", "message"),
    [
        (Scaled, (nn.Linear,), "expected a subclass of QuantInputMixin or QuantMixin, and of Scaled"),
        (Scaled, (QuantInputMixin, nn.ReLU), "expected a subclass of QuantInputMixin or QuantMixin, and of Scaled"),
        (nn.Linear, (QuantLinear,), "Linear is quantized by QuantLinear"),
        (Scaled, (QuantMixin, Scaled), "expected a class attribute default_quant_desc_weight, got none"),
    ],
    ids=["no mixin", "another float class", "taken", "no default weight grid"],
)
def test_wrong_class_is_refused(float_class, bases, message):
    before = list(registered())
    with pytest.raises(InvalidTypeError, match=f"Mine: {message}"):
        register(float_class)(type("Mine", bases, {}))
    assert list(registered()) == before


class LowRank(nn.Module):
    """Two weights, two inputs, none by torch's names."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(32, 16))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down) * gate, self.up)


class QuantLowRank(QuantMixin, LowRank):
    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    input_names = ("x", "gate")
    weight_names = ("down", "up")

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        hidden = nn.functional.linear(self._x_quantizer(x), self._down_quantizer(self.down))
        return nn.functional.linear(hidden * self._gate_quantizer(gate), self._up_quantizer(self.up))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = LowRank()

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.relu(x))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_weights_and_inputs_of_any_name_are_quantized_with_an_example(target):
    register(LowRank)(QuantLowRank)
    model, x = Gated(), torch.randn(4, 16)
    report = fakequant.quantize(model, fakequant.preset("int8"), example_inputs=x, target=target)
    assert str(report) == "1 of 1 LowRank quantized"
    fakequant.calibrate(model, [x], progress=False)
    for name in ("x", "gate", "down", "up"):
        quantizer = getattr(model.mix, f"_{name}_quantizer")
        assert quantizer.is_calibrated
        assert quantizer.axis == (0 if name in ("down", "up") else None)


def test_a_class_that_names_a_weight_it_has_not_is_refused():
    class Misspelled(QuantLowRank):
        weight_names = ("down", "upp")

    with pytest.raises(InvalidValueError, match=r"Misspelled.weight_names: expected parameters of it, got \['upp'\]"):
        Misspelled()


# Classes of a user with the names of torch's ops and layers.


class Add(nn.Module):
    """A sum as a module."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class QuantAdd(QuantInputMixin, Add):
    input_names = ("x", "y")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._x_quantizer(x) + self._y_quantizer(y)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.add = nn.Linear(16, 16), nn.Linear(16, 16), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.one(x), self.other(x))


class Mean(nn.Module):
    """A product, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight).mean(-1)


class QuantMean(QuantMixin, Mean):
    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self._input_quantizer(input), self._weight_quantizer(self.weight)).mean(-1)


class Linear(Mean):
    """A Linear that is not torch's."""


class QuantOtherLinear(QuantMean, Linear):
    default_quant_desc_weight = QuantDescriptor(4, axis=0)


def test_a_class_with_the_name_of_an_op_has_the_quantizers_that_it_calls():
    register(Add)(QuantAdd)
    model, x = Summed(), torch.randn(4, 16)
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule(type="Add", force=True), example_inputs=x)
    fakequant.calibrate(model, [x], progress=False)
    assert list(model.add._modules) == ["_x_quantizer", "_y_quantizer"]
    assert all(quantizer.is_calibrated for quantizer in model.add.children())


def test_a_weight_of_a_class_with_the_name_of_an_op_is_quantized():
    register(Mean)(QuantMean)
    model = nn.Sequential(Mean())
    assert str(fakequant.quantize(model, example_inputs=torch.randn(4, 16))) == "1 of 1 Mean quantized"
    assert type(model[0]) is QuantMean


@pytest.mark.parametrize("example", [None, torch.randn(4, 16)], ids=["no example", "example"])
def test_a_class_with_the_name_of_a_layer_has_the_grid_of_its_own(example):
    register(Linear)(QuantOtherLinear)
    model = nn.Sequential(Linear())
    fakequant.quantize(model, example_inputs=example)
    assert model[0].weight_quantizer.num_bits == 4


# A subclass of a quantized class counts as that class.


class OwnLinear(QuantLinear):
    """As custom_quant_modules puts it into torch.nn."""


@pytest.mark.parametrize("example", [None, torch.randn(4, 16)], ids=["no example", "example"])
def test_a_subclass_of_a_quantized_class_is_reported_as_its_float_class(example):
    report = fakequant.quantize(nn.Sequential(OwnLinear(16, 16)), example_inputs=example)
    assert str(report) == "1 of 1 Linear quantized"


@pytest.mark.parametrize("example", [None, torch.randn(4, 16)], ids=["no example", "example"])
def test_a_subclass_of_a_quantized_class_has_no_more_than_its_own_quantizers(example):
    model = nn.Sequential(OwnLinear(16, 16))
    fakequant.quantize(model, example_inputs=example)
    assert [name for name, _ in named_quantizers(model)] == ["0._input_quantizer", "0._weight_quantizer"]


# Quantizers that a user's class has besides.


class Rounded(nn.Linear):
    """A linear layer with a quantizer of its own."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.inner = TensorQuantizer(QuantDescriptor(amax=1.0))

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(super().forward(input))


class QuantRounded(QuantMixin, Rounded):
    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def forward(self, input: Tensor) -> Tensor:
        weight = self._weight_quantizer(self.weight)
        return self.inner(nn.functional.linear(self._input_quantizer(input), weight, self.bias))


@pytest.mark.parametrize("example", [None, torch.randn(4, 16)], ids=["no example", "example"])
def test_dequantize_leaves_a_users_own_quantizer(example):
    register(Rounded)(QuantRounded)
    model, x = nn.Sequential(Rounded()), torch.randn(4, 16)
    expected = model(x)
    fakequant.quantize(model, example_inputs=example)
    assert type(model[0]) is QuantRounded
    assert torch.equal(fakequant.dequantize(model)(x), expected)
    assert list(model[0]._modules) == ["inner"]
