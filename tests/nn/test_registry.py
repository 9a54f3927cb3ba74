import contextlib

import pytest
import torch
from torch import Tensor, nn

import fakequant
from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.errors import InvalidTypeError, RecipeError
from fakequant.nn import QuantInputMixin, QuantLinear, QuantMixin, quantized_class_of, register, registered, registry
from fakequant.nn.modules.quant_module import QuantizedInputForward


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
