"""Attention: torch's module taken apart, and the function with quantizers at its two products."""

import copy
import math
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fakequant
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.functional import attention
from fakequant.nn.modules.attention import UnfusedMultiheadAttention
from fakequant.nn.modules.linear import QuantNonDynamicallyQuantizableLinear
from fakequant.nn.modules.transformer import undo_unfuse, unfuse

N, L, S, E, HEADS = 3, 5, 7, 8, 2


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# The module.


def pair(**kwargs) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Return torch's module and a copy that is taken apart."""
    module = nn.MultiheadAttention(E, HEADS, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)  # torch's biases are zero at first
    unfused = copy.deepcopy(module)
    unfused.__class__ = UnfusedMultiheadAttention
    return module, unfused


def inputs(module: nn.MultiheadAttention, same: str = "none", batch: int | None = N) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value; "all" or key and value ("pair") or none of them are one tensor."""

    def make(length: int, size: int) -> Tensor:
        if batch is None:
            return torch.randn(length, size)
        return torch.randn(batch, length, size) if module.batch_first else torch.randn(length, batch, size)

    if same == "all":
        return (make(L, E),) * 3
    query, key = make(L, E), make(S, module.kdim)
    return query, key, key if same == "pair" else make(S, module.vdim)


def float_quantizer() -> fakequant.TensorQuantizer:
    """Return one that is at work and changes next to nothing."""
    return fakequant.TensorQuantizer(fakequant.QuantDescriptor(16, amax=100.0))


KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 4},
    "separate, no bias": {"kdim": 6, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
SELF = [name for name, kind in KINDS.items() if "kdim" not in kind]
layouts = pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
weights_or_not = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])


def made(kind, layout) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention, int | None]:
    return *pair(**kind, batch_first=layout != "sequence first"), None if layout == "unbatched" else N


@weights_or_not
@layouts
@every_kind
def test_three_tensors(kind, layout, need_weights):
    module, unfused, batch = made(kind, layout)
    arguments = inputs(module, batch=batch)
    close(unfused(*arguments, need_weights=need_weights), module(*arguments, need_weights=need_weights))


@weights_or_not
@layouts
@pytest.mark.parametrize("kind", SELF)
@pytest.mark.parametrize("same", ["all", "pair"])
def test_one_tensor(same, kind, layout, need_weights):
    module, unfused, batch = made(KINDS[kind], layout)
    arguments = inputs(module, same, batch)
    close(unfused(*arguments, need_weights=need_weights), module(*arguments, need_weights=need_weights))


def as_mask(allowed_not: Tensor, is_bool: bool) -> Tensor:
    return allowed_not if is_bool else torch.randn(allowed_not.shape).masked_fill(allowed_not, -torch.inf)


@weights_or_not
@pytest.mark.parametrize("is_bool", [True, False], ids=["bool", "float"])
@pytest.mark.parametrize("masks", ["padding", "2-D", "3-D", "padding and 2-D", "padding and 3-D"])
@layouts
@pytest.mark.parametrize("kind", [KINDS["plain"], KINDS["everything"]], ids=["plain", "everything"])
def test_masks(kind, layout, masks, is_bool, need_weights):
    module, unfused, batch = made(kind, layout)
    arguments = {"need_weights": need_weights}
    if "padding" in masks:
        padding = torch.rand(N, S) < 0.3
        padding[:, 0] = False  # a row that sees nothing is NaN
        arguments["key_padding_mask"] = as_mask(padding if batch else padding[0], is_bool)
    if "D" in masks:
        mask = torch.rand(*([(batch or 1) * HEADS] if "3-D" in masks else []), L, S) < 0.3
        mask[..., 0] = False
        arguments["attn_mask"] = as_mask(mask, is_bool)
    query, key, value = inputs(module, batch=batch)
    close(unfused(query, key, value, **arguments), module(query, key, value, **arguments))


@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@weights_or_not
@every_kind
def test_causal_hint(kind, need_weights, padded):
    module, unfused = pair(**kind, batch_first=True)
    query, key, value = inputs(module)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        arguments["key_padding_mask"] = torch.arange(S).expand(N, S) > 4
    close(unfused(query, key, value, **arguments), module(query, key, value, **arguments))


@layouts
def test_weights_of_each_head(layout):
    module, unfused, batch = made({}, layout)
    arguments = inputs(module, batch=batch)
    close(unfused(*arguments, average_attn_weights=False), module(*arguments, average_attn_weights=False))


@weights_or_not
def test_dropout_takes_the_same_numbers(need_weights):
    module, unfused = pair(dropout=0.4)
    outputs = []
    for each in (module, unfused):
        torch.manual_seed(1)
        outputs.append(each(*inputs(module), need_weights=need_weights))
    close(outputs[1], outputs[0])


@weights_or_not
def test_no_dropout_in_eval_mode(need_weights):
    module, unfused = pair(dropout=0.4)
    arguments = inputs(module)
    close(unfused.eval()(*arguments, need_weights=need_weights), module.eval()(*arguments, need_weights=need_weights))


@weights_or_not
@every_kind
def test_gradients(kind, need_weights):
    gradients = []
    for module in pair(**kind):
        torch.manual_seed(2)
        arguments = [x.requires_grad_() for x in inputs(module)]
        output, weights = module(*arguments, need_weights=need_weights)
        loss = (output * torch.randn_like(output)).sum()
        loss = loss if weights is None else loss + (weights * torch.randn_like(weights)).sum()
        gradients.append(torch.autograd.grad(loss, [*arguments, *module.parameters()]))
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@weights_or_not
def test_dtypes(need_weights, dtype):
    module, unfused = (m.to(dtype) for m in pair())
    arguments = [x.to(dtype) for x in inputs(module)]
    actual, expected = (m(*arguments, need_weights=need_weights) for m in (unfused, module))
    torch.testing.assert_close(actual, expected)


def test_autocast_gives_torchs_dtype():
    module, unfused = pair()
    arguments = inputs(module)
    mask = torch.zeros(L, S, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (True, False):
            expected = module(*arguments, attn_mask=mask, need_weights=need_weights)
            actual = unfused(*arguments, attn_mask=mask, need_weights=need_weights)
            assert [x.dtype for x in actual if x is not None] == [x.dtype for x in expected if x is not None]


# What does not fit.

WRONG = {
    "batch": (torch.randn(1, S, E), torch.randn(1, S, E), {}, "one batch size"),
    "lengths": (torch.randn(N, S, E), torch.randn(N, 6, E), {}, "one length of key and value"),
    "padding": (*torch.randn(2, N, S, E), {"key_padding_mask": torch.zeros(1, S)}, r"key_padding_mask: .*\(3, 7\)"),
    "2-D": (*torch.randn(2, N, S, E), {"attn_mask": torch.zeros(1, S)}, r"attn_mask: .*\(5, 7\), got \(1, 7\)"),
    "3-D": (*torch.randn(2, N, S, E), {"attn_mask": torch.zeros(N, L, S)}, r"attn_mask: .*\(6, 5, 7\)"),
    "hint": (*torch.randn(2, N, S, E), {"is_causal": True}, "attn_mask: expected the mask"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused(wrong):
    module, unfused = pair(batch_first=True)
    key, value, arguments, message = wrong
    query = torch.randn(N, L, E)
    with pytest.raises((RuntimeError, AssertionError)):
        module(query, key, value, **arguments)
    with pytest.raises(InvalidValueError, match=message):
        unfused(query, key, value, **arguments)


def test_mask_of_integers_is_refused():
    module, unfused = pair(batch_first=True)
    query, key, value = inputs(module)
    with pytest.raises(InvalidTypeError, match="mask: expected bool or floating point, got torch.int64"):
        unfused(query, key, value, attn_mask=torch.ones(L, S, dtype=torch.int64))


def test_four_dimensions_are_refused():
    with pytest.raises(AssertionError, match="4-D query"):
        pair()[1](*[torch.randn(1, 1, L, E)] * 3)


# Quantizers: the switch between the two forwards.


def without_gradient(module: nn.Module, *args, **kwargs):
    with torch.no_grad():
        return module.eval()(*args, **kwargs)


@weights_or_not
@pytest.mark.parametrize("off", ["disable", "disable_quant"])
def test_idle_quantizers_are_bit_identical_to_torchs_fused_kernel(off, need_weights):
    module, unfused = pair(batch_first=True)
    unfused.probe = fakequant.TensorQuantizer()
    getattr(unfused.probe, off)()
    x = torch.randn(N, L, E)
    calls = []
    unfused.out_proj.register_forward_hook(lambda *_: calls.append("out_proj"))
    expected = without_gradient(module, x, x, x, need_weights=need_weights)
    actual = without_gradient(unfused, x, x, x, need_weights=need_weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not calls, "torch's forward reads out_proj.weight"


@pytest.mark.parametrize("on", ["quantizing", "collecting", "one of two", "none there"])
def test_out_proj_is_called_as_a_module(on):
    _, unfused = pair(batch_first=True)
    if on != "none there":
        unfused.probe = fakequant.TensorQuantizer(if_quant=on != "collecting", if_calib=on == "collecting")
    if on == "one of two":
        unfused.other = fakequant.TensorQuantizer(disabled=True)
    calls = []
    unfused.out_proj.register_forward_pre_hook(lambda *_: calls.append("before"))
    unfused.out_proj.register_forward_hook(lambda *_: calls.append("after"))
    x = torch.randn(N, L, E)
    without_gradient(unfused, x, x, x)
    assert calls == ["before", "after"]


def test_quantized_out_proj_is_at_work():
    _, unfused = pair(batch_first=True)
    x = torch.randn(N, L, E)
    expected = without_gradient(unfused, x, x, x)[0]
    unfused.out_proj.__class__ = QuantNonDynamicallyQuantizableLinear
    unfused.out_proj.init_quantizer()
    attended = []
    unfused.out_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    actual = without_gradient(unfused, x, x, x)[0]
    steps = (attended[0].abs().max() * unfused.out_proj.weight.abs().sum(1).max()) / 127
    steps = steps + unfused.out_proj.weight.abs().max() * attended[0].abs().sum(-1).max() / 127
    assert 0 < (actual - expected).abs().max() < steps


# What a recorder sees.


class Recorder(TorchFunctionMode):
    """Names of the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def recorded(module: nn.Module, *args, **kwargs) -> list[str]:
    with Recorder() as recorder:
        without_gradient(module, *args, **kwargs)
    wanted = ("linear", "scaled_dot_product_attention", "matmul", "softmax", "split", "multi_head_attention_forward")
    return [name for name in recorder.names if name in wanted]


def test_calls_of_self_attention():
    x = torch.randn(N, L, E)
    calls = recorded(pair(batch_first=True)[1], x, x, x, need_weights=False)
    assert calls == ["linear", "split", "scaled_dot_product_attention", "linear"]


def test_calls_with_weights():
    x = torch.randn(N, L, E)
    calls = recorded(pair(batch_first=True)[1], x, x, x)
    assert calls == ["linear", "split", "matmul", "softmax", "matmul", "linear"]


@pytest.mark.parametrize(("same", "kind"), [("pair", {}), ("none", {}), ("none", {"kdim": 6, "vdim": 4})])
def test_calls_of_cross_attention(same, kind):
    module, unfused = pair(**kind)
    calls = recorded(unfused, *inputs(module, same), need_weights=False)
    assert [name for name in calls if name != "split"] == [*["linear"] * 3, "scaled_dot_product_attention", "linear"]


def test_projection_reads_the_input_itself():
    seen = []

    class First(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend([args[0]] if func is F.linear else [])
            return func(*args, **(kwargs or {}))

    module, unfused = pair(batch_first=False)
    query, key, value = inputs(module)
    with First():
        unfused(query, key, value)
    assert all(a is b for a, b in zip(seen, (query, key, value), strict=False))


# The switch of classes.


def encoder(**kwargs) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_unfuse_leaves_what_holds_no_quantizers():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    before = types(model)
    unfuse(model)
    assert types(model) == before


def test_unfuse_everywhere_and_back():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    before, keys = types(model), list(model.state_dict())
    unfuse(model, everywhere=True)
    assert not {nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer} & set(types(model))
    assert list(model.state_dict()) == keys
    undo_unfuse(model)
    assert types(model) == before


def test_unfuse_takes_the_attention_that_holds_quantizers():
    model = encoder()
    model.layers[0].self_attn.probe = fakequant.TensorQuantizer()
    unfuse(model)
    assert [type(layer.self_attn) for layer in model.layers] == [UnfusedMultiheadAttention, nn.MultiheadAttention]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_unfused_float_encoder_calls_everything(padded, norm_first):
    model, x = encoder(norm_first=norm_first), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    expected = without_gradient(model, x, src_key_padding_mask=padding)
    unfuse(model, everywhere=True)
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # Not a hook: torch's layers look for hooks, and are slow with them.
            def forward(x, name=name, module=module):
                calls.append(name)
                return F.linear(x, module.weight, module.bias)

            module.forward = forward
    actual = without_gradient(model, x, src_key_padding_mask=padding)
    expected_calls = [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.out_proj", "linear1", "linear2")]
    assert calls == expected_calls
    kept = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
    close(actual[kept], expected[kept])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_idle_encoder_makes_no_nested_tensors_for_a_layer_that_takes_none():
    model, x = encoder(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = without_gradient(model, x, src_key_padding_mask=padding)
    unfuse(model, everywhere=True)
    model.layers[0].probe = fakequant.TensorQuantizer(disabled=True)
    close(without_gradient(model, x, src_key_padding_mask=padding)[~padding], expected[~padding])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_gives_the_same(copied):
    _, unfused = pair(add_bias_kv=True)
    arguments = inputs(unfused)
    copy_of_it = copied(unfused)
    assert type(copy_of_it) is UnfusedMultiheadAttention
    torch.testing.assert_close(copy_of_it(*arguments), unfused(*arguments), rtol=0, atol=0)


def test_torchs_state_dict_loads_strictly():
    module, unfused = pair(kdim=4)
    unfused.load_state_dict(module.state_dict(), strict=True)


# Capture.


class SelfAttention(nn.Module):
    """An attention with a quantizer, of one input [N, L, E]."""

    def __init__(self, need_weights: bool, **kwargs) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = pair(batch_first=True, **kwargs)[1].eval()
        self.attention.probe = float_quantizer()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, padding, self.need_weights)[0]


def captured_inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, L, E), torch.arange(L).expand(batch, L) > 3


CAPTURED = pytest.mark.parametrize("kind", [{}, KINDS["bias_kv"] | KINDS["zero"]], ids=["plain", "bias_kv and zero"])


@CAPTURED
@weights_or_not
def test_compiled_without_graph_break(need_weights, kind):
    model = SelfAttention(need_weights, **kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x, padding = captured_inputs(batch)
        close(compiled(x, padding), model(x, padding))


def test_compiled_follows_the_quantizers():
    model = SelfAttention(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, padding = captured_inputs(2)
    before = compiled(x, padding)
    model.attention.probe.disable()
    close(compiled(x, padding), before)


@CAPTURED
@weights_or_not
def test_torch_export_with_dynamic_shapes(need_weights, kind):
    model = SelfAttention(need_weights, **kind)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dynamic = {"x": {0: batch, 1: length}, "padding": {0: batch, 1: length}}
    exported = torch.export.export(model, captured_inputs(2), dynamic_shapes=dynamic).module()
    x, padding = torch.randn(4, 9, E), torch.arange(9).expand(4, 9) > 6
    close(exported(x, padding), model(x, padding))


@CAPTURED
@weights_or_not
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_with_dynamic_batch(dynamo, need_weights, kind, tmp_path):
    model = SelfAttention(need_weights, **kind).eval()
    del model.attention.probe
    names = ["x", "padding"]
    axes = (
        {"dynamic_shapes": {name: {0: torch.export.Dim.DYNAMIC} for name in names}}
        if dynamo
        else {"dynamic_axes": {name: {0: "batch"} for name in names}}
    )
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, captured_inputs(2), file, input_names=names, dynamo=dynamo, verbose=False, **axes)
    x, padding = captured_inputs(5)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x.numpy(), "padding": padding.numpy()})
    close(torch.from_numpy(actual), model(x, padding).detach())


# The function.


def same(x: Tensor) -> Tensor:
    return x


OFF = {f"{name}_quantizer": same for name in ("query", "key", "value", "softmax")}
SHAPES = {"4-D": (2, 3), "3-D": (3,), "2-D": (), "5-D": (2, 2, 3)}


def operands(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*leading, L, E), torch.randn(*leading, S, E), torch.randn(*leading, S, 6)


def masks(kind: str) -> Tensor | None:
    allowed = torch.rand(L, S) < 0.7
    allowed[:, 0] = True
    return {"none": None, "bool": allowed, "float": torch.randn(L, S)}[kind]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("leading", SHAPES.values(), ids=SHAPES)
def test_identities_give_torchs_attention(leading, mask, scale):
    arguments = (*operands(*leading), None if mask == "causal" else masks(mask), 0.0, mask == "causal")
    close(attention(*arguments, scale=scale, **OFF), F.scaled_dot_product_attention(*arguments, scale=scale))


@pytest.mark.parametrize("shape", [(N, HEADS, L, S), (N, 1, L, S), (N, 1, 1, S)], ids=str)
@pytest.mark.parametrize("is_bool", [True, False], ids=["bool", "float"])
def test_masks_broadcast(shape, is_bool):
    mask = torch.rand(shape) < 0.7 if is_bool else torch.randn(shape)
    mask[..., 0] = True
    arguments = (*operands(N, HEADS), mask)
    close(attention(*arguments, **OFF), F.scaled_dot_product_attention(*arguments))


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_groups_of_heads(heads):
    query, (_, key, value) = operands(N, 6)[0], operands(N, heads)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    close(attention(query, key, value, enable_gqa=True, **OFF), expected)


def test_dropout_takes_the_same_numbers_as_the_formula():
    query, key, value = operands(N, HEADS)
    torch.manual_seed(3)
    actual = attention(query, key, value, None, 0.4, **OFF)
    torch.manual_seed(3)
    probabilities = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(E), -1)
    close(actual, torch.dropout(probabilities, 0.4, train=True) @ value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_function(dtype):
    arguments = [x.to(dtype) for x in operands(N, HEADS)]
    actual = attention(*arguments, masks("bool"), **OFF)
    assert actual.dtype == dtype


def test_mask_and_causal_are_refused():
    with pytest.raises(InvalidValueError, match="attn_mask: expected None with is_causal=True"):
        attention(*operands(1), masks("bool"), is_causal=True, **OFF)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_gradients_are_torchs(mask):
    arguments = [x.requires_grad_() for x in operands(N, HEADS)]
    added = masks(mask)
    coefficients = torch.randn(N, HEADS, L, 6)
    gradients = [
        torch.autograd.grad((function(*arguments, added, **kwargs) * coefficients).sum(), arguments)
        for function, kwargs in ((attention, OFF), (F.scaled_dot_product_attention, {}))
    ]
    close(gradients[0], gradients[1])


AMAX = {"query": 0.9, "key": 2.5, "value": 2.0, "softmax": 1.0}


def quantizers() -> dict[str, fakequant.TensorQuantizer]:
    return {
        f"{name}_quantizer": fakequant.TensorQuantizer(fakequant.QuantDescriptor(8, amax=amax))
        for name, amax in AMAX.items()
    }


def quantized_by_definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: int = 1):
    """Return the int8 codes' attention in NumPy."""

    def on_grid(x, name):
        scale = np.float64(AMAX[name] / 127)
        return np.clip(np.rint(x / scale), -128, 127) * scale

    q, k, v = (x.double().numpy() for x in (query, key, value))
    k, v = (np.repeat(x, groups, axis=-3) for x in (k, v))
    scores = on_grid(q / math.sqrt(E), "query") @ np.swapaxes(on_grid(k, "key"), -1, -2)
    if mask is not None:
        scores = np.where(mask.numpy(), scores, -np.inf) if mask.dtype == torch.bool else scores + mask.numpy()
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    return on_grid(probabilities, "softmax") @ on_grid(v, "value")


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 3])
def test_quantized_attention_is_the_formula(groups, mask):
    query, (_, key, value) = operands(N, 6)[0], operands(N, 6 // groups)
    added = masks(mask)
    actual = attention(query, key, value, added, enable_gqa=groups > 1, **quantizers())
    expected = quantized_by_definition(query, key, value, added, groups)
    # A probability on a boundary may round the other way in float32: one step of it times one value.
    off = np.abs(actual.numpy() - expected)
    assert off.max() < AMAX["softmax"] / 127 * AMAX["value"] * 1.02
    assert np.median(off) < 1e-6


def test_each_quantizer_gets_its_tensor():
    query, key, value = operands(N, HEADS)
    seen = {}

    def spy(name):
        return lambda x: seen.setdefault(name, x)

    attention(query, key, value, scale=0.3, **{name: spy(name) for name in OFF})
    close(seen["query_quantizer"], query * 0.3)
    assert torch.equal(seen["key_quantizer"], key.transpose(-2, -1))  # no node between it and the product
    assert seen["value_quantizer"] is value
    close(seen["softmax_quantizer"].sum(-1), torch.ones(N, HEADS, L))


class Function(nn.Module):
    """The function with quantizers, as a model."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.quantizers = nn.ModuleDict(quantizers())
        self.eval()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        arguments = {"causal": {"is_causal": True}, "groups": {"enable_gqa": True}}.get(self.variant)
        if arguments is None:
            arguments = {"attn_mask": mask if self.variant == "bool" else mask.float()}
        return attention(query, key, value, **arguments, **self.quantizers)


def function_inputs(variant: str, batch: int, length: int) -> tuple[Tensor, ...]:
    heads = 1 if variant == "groups" else 2
    shapes = ((batch, 2, length, E), (batch, heads, length, E), (batch, heads, length, 6))
    return *(torch.randn(shape) for shape in shapes), torch.ones(length, length, dtype=torch.bool).tril()


every_variant = pytest.mark.parametrize("variant", ["bool", "float", "causal", "groups"])


@every_variant
def test_compiled_function(variant):
    model, arguments = Function(variant), function_inputs(variant, 2, L)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(*arguments), model(*arguments))


@every_variant
def test_exported_function_with_dynamic_shapes(variant):
    model, arguments = Function(variant), function_inputs(variant, 2, L)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dynamic = (*[{0: batch, 2: length}] * 3, {0: length, 1: length})
    exported = torch.export.export(model, arguments, dynamic_shapes=dynamic).module()
    arguments = function_inputs(variant, 3, 9)
    close(exported(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")  # TensorQuantizer
@every_variant
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_of_the_function(dynamo, variant, tmp_path):
    model, arguments = Function(variant), function_inputs(variant, 2, L)
    names = ["query", "key", "value", "mask"]
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, arguments, file, input_names=names, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    feed = {name: x.numpy() for name, x in zip(names, arguments, strict=True) if name in known}
    (actual,) = session.run(None, feed)
    step = AMAX["softmax"] / 127 * AMAX["value"]
    assert np.abs(actual - model(*arguments).numpy()).max() < 1.02 * step
