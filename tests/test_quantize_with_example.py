"""Quantizing with an example: models that hold quantizers already, and what stays torch's own."""

import pytest
import torch
from torch import Tensor, nn

import fakequant as fq
from fakequant.call_sites import call_sites
from fakequant.nn.walk import named_quantizers

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


def test_a_layer_that_was_not_called_goes_by_its_float_class(patched):
    with fq.patched_torch_nn():
        patched.spare = nn.Linear(16, 16)
    report = fq.quantize(patched, example_inputs=(X,))
    expected = ("Linear", "was not called in the example forward")
    assert [(layer.type, layer.reason) for layer in report.layers if layer.name == "spare"] == [expected]


# Errors leave the model as it was.


def state(model: nn.Module) -> list[object]:
    """Return what quantization changes of each module: class, children, hooks, switch, grid."""
    return [
        (
            type(module),
            {name: id(child) for name, child in module._modules.items()},
            [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())],
            (module.is_enabled, module.descriptor) if isinstance(module, fq.TensorQuantizer) else None,
        )
        for module in model.modules()
    ]


class SelfAttention(nn.Module):
    """Attention that a patch of torch.nn reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def convolutions() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)), nn.Flatten(), nn.Linear(16 * 6 * 6, 16))


HALF_FLOAT = fq.Rule("2", input=None, target="tensorrt")
"""Refused when the quantizers of the layers before are in place: a target has a layer as a whole or not."""


@pytest.mark.parametrize("first", [fq.Rule("0"), fq.Rule("0", input=None), fq.Rule("0", weight=D(4, axis=0))])
def test_an_error_leaves_a_model_built_under_the_patch_unchanged(first):
    with fq.patched_torch_nn():
        model = convolutions()
    model[0].input_quantizer.num_bits = 6
    before = state(model)
    with pytest.raises(fq.RecipeError, match=r"^2: expected rules that leave the layer as a whole float"):
        fq.quantize(model, fq.preset("int8") + first + HALF_FLOAT, example_inputs=(X,))
    assert state(model) == before


def test_an_error_leaves_attention_built_under_the_patch_unchanged():
    with fq.patched_torch_nn():
        model = nn.Sequential(SelfAttention(), nn.Identity(), nn.Linear(64, 64))
    before = state(model)
    with pytest.raises(fq.RecipeError):
        fq.quantize(model.eval(), fq.preset("int8") + HALF_FLOAT, example_inputs=(TOKENS,))
    assert state(model) == before


def test_an_error_without_an_example_leaves_call_sites():
    model = nn.Sequential(Residual(), nn.Linear(6, 6))
    fq.quantize(model, fq.preset("int8") + fq.Rule("1", input=None, weight=None), example_inputs=(X,))
    before = state(model)
    with pytest.raises(fq.InvalidValueError, match="calib_method"):
        fq.quantize(model, fq.preset("int8") + fq.Rule("1", weight=D(calib_method="x")))
    assert state(model) == before


def test_a_handle_of_a_hook_still_removes_it_after_an_error():
    model, calls = convolutions(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append("conv"))
    with pytest.raises(fq.RecipeError):
        fq.quantize(model, fq.preset("int8") + HALF_FLOAT, example_inputs=(X,))
    handle.remove()
    calls.clear()
    model(X)
    assert calls == []


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


def test_attention_built_under_the_patch_has_the_quantizers_of_any_other():
    model = SelfAttention().eval()
    fq.quantize(model, example_inputs=(TOKENS,))
    with fq.patched_torch_nn():
        patched = SelfAttention().eval()
    fq.quantize(patched, example_inputs=(TOKENS,))
    assert [name for name, _ in named_quantizers(patched)] == [name for name, _ in named_quantizers(model)]


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("example", [None, (X,)], ids=["layers", "placed"])
def test_quantizers_begin_in_the_mode_of_the_model(mode, example):
    model = Residual().train(mode)
    fq.quantize(model, example_inputs=example)
    assert {module.training for module in model.modules()} == {mode}
