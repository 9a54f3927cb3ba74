"""nn.MultiheadAttention with quantizers of its own, as ``quantize`` without an example and ``initialize`` make it."""

import numpy as np
import pytest
import torch
from torch import nn

import fakequant
from fakequant import Rule, preset
from fakequant.nn import QuantMultiheadAttention, TensorQuantizer
from fakequant.nn.modules.attention import UnfusedMultiheadAttention

E, HEADS = 8, 2
KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 4},
}


def made(**kwargs):
    """Return a calibrated module and query, key and value."""
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    fakequant.quantize(module)
    inputs = torch.randn(3, 5, E), torch.randn(3, 7, module.kdim), torch.randn(3, 7, module.vdim)
    fakequant.calibrate(module, [inputs], forward=lambda module, batch: module(*batch), progress=False)
    return module, inputs


def on_grid(x, quantizer):
    """Round by the definition, in NumPy."""
    scale = quantizer.amax.numpy() / np.float32(127)
    return np.clip(np.rint(x / scale), -127 if quantizer.narrow_range else -128, 127) * scale


def attention(module, query, key, value):
    """Return the output by the formula of the paper (arXiv:1706.03762), with every operand on its grid."""
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    separate = [state.get(f"{name}_proj_weight") for name in "qkv"]
    weights = separate if separate[0] is not None else np.split(state["in_proj_weight"], 3)
    biases = np.split(state.get("in_proj_bias", np.zeros(3 * E, np.float32)), 3)
    heads = []
    for name, x, weight, bias in zip(("query", "key", "value"), (query, key, value), weights, biases, strict=True):
        own, of_weight = (getattr(module, f"_{kind}_quantizer") for kind in (name, f"{name}_weight"))
        projected = on_grid(x.numpy(), own) @ on_grid(weight, of_weight).T + bias
        heads.append(projected.reshape(3, -1, HEADS, E // HEADS).swapaxes(1, 2))
    q, k, v = heads
    q = on_grid(q / np.sqrt(np.float32(E // HEADS)), module._q_quantizer)
    scores = q @ on_grid(k, module._k_quantizer).swapaxes(-1, -2)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = on_grid(exponentials / exponentials.sum(-1, keepdims=True), module._softmax_quantizer)
    attended = probabilities @ on_grid(v, module._v_quantizer)
    out = module.out_proj
    attended = on_grid(attended.swapaxes(1, 2).reshape(3, -1, E), out.input_quantizer)
    bias = state.get("out_proj.bias", np.float32(0))
    return attended @ on_grid(state["out_proj.weight"], out.weight_quantizer).T + bias


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_product_is_of_quantized_operands(kind, need_weights):
    module, inputs = made(**kind)
    with torch.no_grad():
        actual, _ = module(*inputs, need_weights=need_weights)
    # An operand that rounds to another code, at a tie of two float computations, moves an output by a step.
    error = np.abs(actual.numpy() - attention(module, *inputs))
    assert np.median(error) < 1e-6
    assert error.max() < 0.05


@pytest.mark.parametrize("same", ["one tensor", "three tensors"])
def test_every_quantizer_is_calibrated(same):
    module = nn.MultiheadAttention(E, HEADS)
    fakequant.quantize(module)
    x = torch.randn(5, 3, E)
    batch = (x, x, x) if same == "one tensor" else (x, x.clone(), x.clone())
    fakequant.calibrate(module, [batch], forward=lambda module, batch: module(*batch), progress=False)
    assert all(quantizer.is_calibrated for _, quantizer in fakequant.nn.walk.named_quantizers(module))


def test_one_tensor_gives_what_three_copies_of_it_give():
    module, (x, _, _) = made()
    assert torch.equal(module(x, x, x)[0], module(x, x.clone(), x.clone())[0])


def test_weights_are_parts_of_the_packed_one():
    module = QuantMultiheadAttention(E, HEADS)
    parts = [getattr(module, name) for name in module.weight_names]
    assert torch.equal(torch.cat(parts), module.in_proj_weight)
    assert {part.untyped_storage().data_ptr() for part in parts} == {module.in_proj_weight.untyped_storage().data_ptr()}


def test_constructor_quantizes_the_output_projection_too():
    grid = fakequant.QuantDescriptor(4)
    module = QuantMultiheadAttention(E, HEADS, quant_desc_input=grid, quant_desc_weight=grid)
    assert {q.descriptor for q in module.modules() if isinstance(q, TensorQuantizer)} == {grid}
    assert type(module.out_proj) is fakequant.nn.QuantNonDynamicallyQuantizableLinear


def test_rule_leaves_the_output_projection_float():
    module = nn.MultiheadAttention(E, HEADS)
    fakequant.quantize(module, preset("int8") + Rule("out_proj", input=None, weight=None))
    assert type(module) is QuantMultiheadAttention
    assert type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(E, HEADS, 16),
        nn.TransformerDecoderLayer(E, HEADS, 16),
        nn.Transformer(E, HEADS, 1, 1, 16, batch_first=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_transformers_are_quantized_throughout(model):
    report = fakequant.quantize(model)
    assert not report.left_float
    batch = (torch.randn(5, 2, E),) * (1 if isinstance(model, nn.TransformerEncoderLayer) else 2)
    fakequant.calibrate(model, [batch], forward=lambda model, batch: model(*batch), progress=False)
    with torch.no_grad():
        quantized = model.eval()(*batch)
        exact = fakequant.dequantize(model)(*batch)
    assert 1e-4 < (quantized - exact).abs().max() < 0.3


def test_without_gradient_it_is_quantized_too():
    module, inputs = made()
    with_gradient = module.eval()(*inputs, need_weights=False)[0]
    with torch.no_grad():
        assert torch.equal(module(*inputs, need_weights=False)[0], with_gradient)


def test_example_puts_the_quantizers_to_the_calls_instead():
    with fakequant.patched_torch_nn():
        module = nn.Sequential(nn.MultiheadAttention(64, HEADS, batch_first=True))[0]
    x = torch.randn(2, 16, 64)
    fakequant.quantize(module, example_inputs=(x, x, x))
    assert isinstance(module, UnfusedMultiheadAttention)
    assert not isinstance(module, QuantMultiheadAttention)
    assert not [name for name, _ in module.named_children() if name.startswith("_query")]


def test_failed_placement_leaves_the_module_as_it_was(monkeypatch):
    def fail(*_):
        raise RuntimeError("on purpose")

    module = QuantMultiheadAttention(64, HEADS, batch_first=True)
    before = list(module.state_dict())
    x = torch.randn(2, 16, 64)
    monkeypatch.setattr("fakequant.convert.install", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        fakequant.quantize(module, example_inputs=(x, x, x))
    assert type(module) is QuantMultiheadAttention
    assert list(module.state_dict()) == before
