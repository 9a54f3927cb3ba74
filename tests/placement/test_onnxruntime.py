"""The edges that ONNX Runtime's placement picks, by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq


class Net(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=16, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def conv_bn():
    return nn.Sequential(conv(bias=False), nn.BatchNorm2d(16))


X = torch.rand(1, 16, 8, 8)
LAST = {"fc.input", "fc.weight"}


def edges(model, x=X):
    return {edge.name: edge for edge in fq.plan(model.eval(), x, "onnxruntime").report.edges}


def quantized(function, **children):
    """Return the quantized edges of a network with a linear layer at its end, which is left out."""
    model = Net(lambda m, x: m.fc(function(m, x).mean((2, 3))), fc=nn.Linear(16, 16), **children)
    found = {name for name, edge in edges(model).items() if edge.descriptor is not None}
    assert found >= LAST
    return found - LAST


def layers(*names):
    return {f"{name}.{operand}" for name in names for operand in ("input", "weight")}


def test_both_sides_of_an_add():
    found = quantized(lambda m, x: F.relu(m.a(x) + x), a=conv_bn())
    assert found == layers("a.0") | {"add_0.input", "add_0.other", "mean_0.input"}


def test_an_add_of_what_no_integer_kernel_makes_is_float():
    assert "add_0.input" not in quantized(lambda m, x: m.a(x.exp() + x.sin()), a=conv())


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.relu6, lambda x: x.clamp(min=0), lambda x: F.hardtanh(x, 0, 6)],
    ids=["relu", "relu6", "clamp", "hardtanh"],
)
def test_what_a_convolution_absorbs_is_not_split_from_it(activation):
    assert quantized(lambda m, x: activation(m.a(x)), a=conv()) == layers("a") | {"mean_0.input"}


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu_0", F.silu), ("hardswish_0", F.hardswish), ("gelu_0", F.gelu), ("hardtanh_0", F.hardtanh)],
)
def test_an_activation_that_is_not_absorbed_reads_quantized(name, activation):
    found = quantized(lambda m, x: m.b(activation(m.a(x))), a=conv(), b=conv())
    assert found == layers("a", "b") | {f"{name}.input", "mean_0.input"}


def test_silu_written_out_is_quantized_around_both_ops():
    def function(m, x):
        y = m.a(x)
        return y * torch.sigmoid(y)

    found = quantized(function, a=conv())
    assert found == layers("a") | {"sigmoid_0.input", "mul_0.input", "mul_0.other", "mean_0.input"}


def test_operands_of_a_concatenation():
    found = quantized(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), x], 1)), a=conv(), c=conv(32))
    assert found == layers("a", "c") | {"cat_0.tensors_0", "cat_0.tensors_1", "mean_0.input"}


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=lambda pool: type(pool).__name__)
def test_pools(pool):
    found = quantized(lambda m, x: m.b(m.pool(m.a(x))), a=conv(), b=conv(), pool=pool)
    assert found == layers("a", "b") | {"pool.input", "mean_0.input"}


def test_a_transposed_convolution_is_float_and_so_is_the_convolution_before_it():
    up = nn.ConvTranspose2d(16, 16, 2, stride=2)
    assert quantized(lambda m, x: m.up(m.a(x)), a=conv(), up=up) == set()


def test_a_small_layer_is_quantized():
    assert quantized(lambda m, x: m.b(m.a(x)), a=conv(16, 3), b=conv(3, 16)) == layers("a", "b") | {"mean_0.input"}


@pytest.mark.parametrize(
    "function", [lambda m, x: m.a(x), lambda m, x: (y := m.a(x), m.b(y))], ids=["only", "one of two outputs"]
)
def test_a_convolution_whose_output_leaves_the_model_is_float(function):
    found = edges(Net(function, a=conv(), b=nn.Sequential(conv(), nn.Flatten(), nn.Linear(1024, 16))))
    assert found["a.input"].descriptor is None
    assert "leaves the model" in found["a.input"].reason


def test_a_linear_layer_needs_no_quantizer_behind_it():
    model = Net(lambda m, x: F.gelu(m.a(x)) + x, a=nn.Linear(16, 16))
    found = edges(model, torch.rand(2, 5, 16))
    assert {name for name, edge in found.items() if edge.descriptor is not None} == layers("a")


def test_attention_is_float():
    model = Net(
        lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(x), x), a=nn.Linear(16, 16), b=nn.Linear(16, 16)
    )
    found = edges(model, torch.rand(2, 5, 16))
    assert {name for name, edge in found.items() if edge.descriptor is not None} == layers("a", "b")


def test_a_rule_that_leaves_a_convolution_float_leaves_the_add_alone():
    model = Net(lambda m, x: m.b(m.a(x.exp()) + x.sin()), a=conv(), b=conv())
    recipe = fq.preset("int8") + fq.Rule("a", input=None, weight=None)
    found = fq.plan(model.eval(), X, "onnxruntime", recipe).report.edges
    assert not any(edge.descriptor for edge in found if "add" in edge.name)
