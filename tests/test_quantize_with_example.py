"""Quantizing with an example: models that hold quantizers already, and what stays torch's own."""

import pytest
import torch
from torch import Tensor, nn

import fakequant as fq
from fakequant.call_sites import call_sites

D = fq.QuantDescriptor


class Residual(nn.Module):
    """A convolution around which its input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


X = torch.rand(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def patched():
    with fq.patched_torch_nn():
        return Residual()


def skip(model: nn.Module) -> fq.TensorQuantizer:
    return dict(call_sites(model))["add_0"]._modules["other"]


def test_a_model_built_under_the_patch_shares_quantizers_like_any_other(patched):
    fq.quantize(patched, example_inputs=(X,))
    assert skip(patched) is patched.conv.input_quantizer


def test_it_keeps_the_grids_of_its_layers(patched):
    patched.conv.init_quantizer(D(num_bits=5), D(num_bits=4, axis=0))
    report = fq.quantize(patched, example_inputs=(X,))
    assert patched.conv.input_quantizer.descriptor == D(num_bits=5)
    assert patched.conv.weight_quantizer.descriptor == D(num_bits=4, axis=0)
    assert {edge.name: edge.descriptor.num_bits for edge in report.edges if edge.descriptor} == {
        "conv.input": 5,
        "conv.weight": 4,
        "add_0.other": 8,
    }


def test_a_rule_gives_it_other_grids(patched):
    fq.quantize(patched, fq.preset("int8") + fq.Rule("conv", input=D(num_bits=6)), example_inputs=(X,))
    assert patched.conv.input_quantizer.num_bits == 6


def test_what_is_switched_off_stays_off(patched):
    patched.conv.input_quantizer.disable()
    report = fq.quantize(patched, example_inputs=(X,))
    assert not patched.conv.input_quantizer.is_enabled
    assert {edge.name: edge.reason for edge in report.edges}["conv.input"] == "its quantizer is disabled"


@pytest.mark.parametrize("function", [fq.plan, lambda model, x: fq.quantize(model, example_inputs=x)])
def test_ranges_are_not_thrown_away(function, patched):
    fq.calibrate(patched, [X], progress=False)
    before = {name: tensor.clone() for name, tensor in patched.state_dict().items()}
    with pytest.raises(fq.InvalidValueError, match=r"^conv._input_quantizer: expected a quantizer without a range"):
        function(patched, (X,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in patched.state_dict().items())


@pytest.mark.parametrize("function", [fq.plan, lambda model, x: fq.quantize(model, example_inputs=x)])
def test_call_sites_are_not_made_twice(function):
    model = nn.Sequential(Residual())
    fq.quantize(model, example_inputs=(X,))
    with pytest.raises(fq.InvalidValueError, match=r"^0: expected a model without call sites"):
        function(model, (X,))


def test_after_dequantize_it_can_be_quantized_again():
    model = Residual()
    first = fq.quantize(model, example_inputs=(X,))
    assert fq.quantize(fq.dequantize(model), example_inputs=(X,)) == first


class Encoder(nn.Module):
    """Two of torch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


TOKENS = torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(0))


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_attention_that_a_rule_leaves_float_stays_torchs():
    model = Encoder().eval()
    expected = model.encoder.layers[1](TOKENS)
    before = types(model.encoder.layers[1])
    recipe = fq.preset("int8") + fq.Rule("encoder.layers.1.*", input=None, weight=None)
    fq.quantize(model, recipe, example_inputs=(TOKENS,))
    assert types(model.encoder.layers[1]) == before
    assert torch.equal(model.encoder.layers[1](TOKENS), expected)
    assert type(model.encoder.layers[0].self_attn) is not nn.MultiheadAttention


def test_the_plan_of_a_model_with_quantizers_sees_inside_attention():
    expected = {edge.name for edge in fq.plan(Encoder().eval(), (TOKENS,)).report.edges}
    with fq.patched_torch_nn():
        model = Encoder().eval()
    assert {edge.name for edge in fq.plan(model, (TOKENS,)).report.edges} == expected
