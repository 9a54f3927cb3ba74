"""A recipe about layers only puts quantizers on their inputs and weights, and on nothing else."""

import pytest
import torch
from torch import Tensor, nn

import fakequant as fq


class Block(nn.Module):
    """A residual block; ONNX Runtime's own placement leaves the last convolution float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(x + self.conv(x)))


X = torch.zeros(1, 8, 4, 4)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_layers_get_quantizers_and_nothing_else(target):
    plan = fq.plan(Block(), X, target, "dynamic")
    quantized = [slot.name for slot in plan.slots if slot.grids]
    assert quantized == ["conv.input", "conv.weight", "last.input", "last.weight"]


def test_every_target_has_the_same_quantizers():
    plan = fq.plan(Block(), X, "onnxruntime", "dynamic")
    assert all(slot.grids.keys() == {"tensorrt", "onnxruntime"} for slot in plan.slots)


def test_weights_alone_need_no_input_quantizer():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fq.quantize(model, "int4", example_inputs=torch.zeros(2, 8))
    assert [
        name for name, module in model.named_modules() if isinstance(module, fq.TensorQuantizer) and module.is_enabled
    ] == ["0._weight_quantizer"]


def test_a_rule_about_an_op_matches_nothing():
    with pytest.raises(fq.RecipeError, match="expected to match a layer"):
        fq.plan(Block(), X, "onnxruntime", fq.preset("dynamic") + fq.Rule(type="add"))


def test_a_rule_leaves_a_layer_float():
    recipe = fq.preset("dynamic") + fq.Rule("conv", input=None, weight=None, reason="sensitive")
    plan = fq.plan(Block(), X, "onnxruntime", recipe)
    assert {slot.name: slot.reason for slot in plan.slots if not slot.grids} == {
        "conv.input": "sensitive",
        "conv.weight": "sensitive",
    }


@pytest.mark.parametrize("groups", [2, 8])
def test_a_convolution_in_groups_stays_float_unless_forced(groups):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups))
    (layer,) = fq.plan(model, X, "onnxruntime", "dynamic").report.left_float
    assert layer.reason == "a convolution in groups has no integer kernel for ranges of a call"
    forced = fq.preset("dynamic") + fq.Rule("0", force=True)
    assert len(fq.plan(model, X, "onnxruntime", forced).report.quantized) == 1
