"""One battery for every registered quantized class, each with several constructor variants.

What runs the file of each: ``python tests/support``.
"""

import copy
import dataclasses
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

import fakequant
from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import QuantConv1d, QuantConv2d, QuantLinear, QuantMixin, registered
from fakequant.nn.walk import weights_of_quantizers


@dataclasses.dataclass(frozen=True)
class Case:
    """A class, how it is made, and what it is called with: an input of a shape, or what ``make_inputs`` returns."""

    float_class: type[nn.Module]
    label: str
    args: tuple[Any, ...]
    shape: tuple[int, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    make_inputs: Callable[[], tuple[Tensor, ...]] | None = None

    @property
    def quantized_class(self) -> Any:
        return dict(registered())[self.float_class]

    def quantized(self, **kwargs: Any) -> Any:
        return self.quantized_class(*self.args, **self.kwargs, **kwargs)

    def calibrated(self) -> tuple[Any, tuple[Tensor, ...]]:
        """Return a quantized module with fixed ranges that clip a little, and inputs."""
        module, inputs = self.quantized(), self.inputs()
        fakequant.calibrate(module, [inputs], forward=lambda module, batch: self.run(module, batch), progress=False)
        weights = weights_of_quantizers(module)
        for quantizer in quantizers(module):
            quantizer.amax = quantizer.amax * (0.9 if quantizer in weights else 0.7)
        return module, inputs

    def pair(self) -> tuple[nn.Module, Any]:
        """Return a float module and a quantized one with the same parameters."""
        float_module, quantized = self.float_class(*self.args, **self.kwargs), self.quantized()
        quantized.load_state_dict(float_module.state_dict())
        return float_module, quantized

    def inputs(self) -> tuple[Tensor, ...]:
        return self.make_inputs() if self.make_inputs else (torch.randn(self.shape),)

    def run(self, function: Any, inputs: tuple[Tensor, ...]) -> Any:
        """Call a module, each time with the same random numbers."""
        torch.manual_seed(1)
        return function(*inputs, **self.call)

    @property
    def quantizes_arguments(self) -> bool:
        """Whether its input quantizers are those of its arguments, not of something that it computes."""
        return len(self.quantized_class.input_names) <= 2

    def __str__(self) -> str:
        return f"{self.float_class.__name__}-{self.label}"


def _conv_cases(d: int) -> list[Case]:
    cls = getattr(nn, f"Conv{d}d")
    batched, size = (2, 4, *(7, 6, 5)[:d]), (3, 2, 3)[:d]
    case = functools.partial(Case, cls)
    modes = ("zeros", "reflect", "replicate", "circular")
    return [
        case("plain", (4, 6, 3), batched),
        case("positional", (4, 6, 3, 2, 1, 1, 2, False), batched),
        case("no bias", (4, 6, size), batched, {"bias": False}),
        case("groups", (4, 6, 3), batched, {"groups": 2, "padding": 1}),
        case("depthwise", (4, 4, 3), batched, {"groups": 4}),
        case("dilation", (4, 6, 2), batched, {"dilation": 2, "stride": 2}),
        case("device and dtype", (4, 6, 3), batched, {"device": "cpu", "dtype": torch.float32}),
        case("unbatched", (4, 6, 3), batched[1:]),
        case("valid", (4, 6, 3), batched, {"padding": "valid"}),
        *(case(f"{mode} 1", (4, 6, 3), batched, {"padding": 1, "padding_mode": mode}) for mode in modes),
        *(case(f"{mode} same", (4, 6, 3), batched, {"padding": "same", "padding_mode": mode}) for mode in modes),
        case("circular wide", (4, 6, 5), batched, {"padding": 2, "padding_mode": "circular"}),
    ]


def _conv_transpose_cases(d: int) -> list[Case]:
    cls = getattr(nn, f"ConvTranspose{d}d")
    batched = (2, 4, *(5, 4, 3)[:d])
    even = [2 * n for n in batched[2:]]
    case = functools.partial(Case, cls)
    return [
        case("plain", (4, 6, 3), batched),
        case("positional", (4, 6, 3, 2, 1, 1, 2, False, 1, "zeros"), batched),
        case("groups", (4, 6, 3), batched, {"groups": 2, "bias": False}),
        case("dilation", (4, 6, 2), batched, {"dilation": 2, "padding": 1}),
        case("unbatched", (4, 6, 3), batched[1:]),
        case("output_size", (4, 6, 3), batched, {"stride": 2, "padding": 1}, {"output_size": even}),
        case(
            "output_size dilation",
            (4, 6, 3),
            batched,
            {"stride": 2, "padding": 2, "dilation": 2},
            {"output_size": even},
        ),
    ]


def _pool_cases(d: int) -> list[Case]:
    shape = (2, 3, *(8, 7, 6)[:d])
    max_pool, avg_pool, adaptive = (getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveAvg"))
    return [
        Case(max_pool, "plain", (2,), shape),
        Case(max_pool, "positional", (3, 2, 1, 1), shape),
        Case(max_pool, "indices", (2,), shape, {"return_indices": True, "ceil_mode": True}),
        Case(max_pool, "unbatched", (2,), shape[1:]),
        Case(avg_pool, "plain", (2,), shape),
        Case(avg_pool, "positional", (3, 2, 1, True, False), shape),
        Case(avg_pool, "unbatched", (2,), shape[1:], {"ceil_mode": True}),
        Case(adaptive, "plain", (2,), (2, 3, *[6] * d)),
        Case(adaptive, "keyword", (), shape, {"output_size": 3}),
        Case(adaptive, "unbatched", (1,), shape[1:]),
    ]


def _instance_norm_cases(d: int) -> list[Case]:
    shape = (2, 3, *(8, 7, 6)[:d])
    case = functools.partial(Case, getattr(nn, f"InstanceNorm{d}d"))
    return [
        case("plain", (3,), shape),
        case("affine", (3, 1e-4, 0.2, True), shape),
        case("running", (3,), shape, {"track_running_stats": True, "affine": True, "device": "cpu"}),
        case("unbatched", (3,), shape[1:]),
    ]


_LINEAR_CASES = [
    Case(nn.Linear, "plain", (5, 3), (4, 5)),
    Case(nn.Linear, "positional", (5, 3, False), (4, 5)),
    Case(nn.Linear, "tokens", (5, 3), (2, 4, 5), {"bias": True, "dtype": torch.float32}),
    Case(nn.Linear, "unbatched", (5, 3), (5,)),
    Case(NonDynamicallyQuantizableLinear, "plain", (5, 3), (2, 4, 5)),
    Case(NonDynamicallyQuantizableLinear, "no bias", (5, 3), (4, 5), {"bias": False}),
]


def _numbers(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _indices(*shape: int, offsets: tuple[int, ...] = (), weighted: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        made = [torch.arange(math.prod(shape)).remainder(6).reshape(shape)]  # every row
        made += [torch.tensor(offsets)] if offsets else []
        return (*made, None, torch.rand(shape)) if weighted else tuple(made)

    return make


_BILINEAR_CASES = [
    Case(nn.Bilinear, "plain", (3, 4, 5), make_inputs=_numbers((2, 3), (2, 4))),
    Case(nn.Bilinear, "positional", (3, 4, 5, False), make_inputs=_numbers((2, 6, 3), (2, 6, 4))),
]
_embedding = functools.partial(Case, nn.Embedding, args=(6, 4), make_inputs=_indices(2, 5))
_bag = functools.partial(Case, nn.EmbeddingBag, args=(6, 4), make_inputs=_indices(2, 5))
_EMBEDDING_CASES = [
    _embedding("plain"),
    _embedding("padding", kwargs={"padding_idx": -2, "scale_grad_by_freq": True}),
    _embedding("max_norm", kwargs={"max_norm": 0.5, "norm_type": 1.0}),
    _embedding("sparse", kwargs={"sparse": True, "max_norm": 1.0}),
    _bag("plain"),
    _bag("sum", kwargs={"mode": "sum", "padding_idx": 1, "max_norm": 1.0}),
    _bag("max", kwargs={"mode": "max"}, make_inputs=_indices(7, offsets=(0, 3))),
    _bag("weighted", kwargs={"mode": "sum", "sparse": True}, make_inputs=_indices(2, 5, weighted=True)),
    _bag("last", kwargs={"include_last_offset": True}, make_inputs=_indices(7, offsets=(0, 3, 7))),
]
_attention = functools.partial(
    Case, nn.MultiheadAttention, args=(8, 2), make_inputs=_numbers((5, 2, 8), (6, 2, 8), (6, 2, 8))
)
_ATTENTION_CASES = [
    _attention("plain"),
    _attention("no weights", call={"need_weights": False}),
    _attention("self", make_inputs=lambda: (torch.randn(5, 2, 8),) * 3, kwargs={"bias": False}),
    _attention("kdim", kwargs={"kdim": 3, "vdim": 4}, make_inputs=_numbers((5, 2, 8), (6, 2, 3), (6, 2, 4))),
    _attention("more keys", kwargs={"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.2}),
    _attention("batch first", kwargs={"batch_first": True}, make_inputs=_numbers((2, 5, 8), (2, 6, 8), (2, 6, 8))),
]
_PLAIN_ACTIVATIONS = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU
    Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
"""
_ACTIVATION_CASES = [
    *(Case(getattr(nn, name), "plain", (), (2, 4, 3)) for name in _PLAIN_ACTIVATIONS.split()),
    *(Case(cls, "plain", (1,), (2, 4, 3)) for cls in (nn.GLU, nn.LogSoftmax, nn.Softmax, nn.Softmin)),
    Case(nn.RReLU, "plain", (0.2, 0.2), (2, 4, 3)),
    Case(nn.GELU, "tanh", (), (2, 4, 3), {"approximate": "tanh"}),
    Case(nn.PReLU, "channels", (4,), (2, 4, 3)),
    Case(nn.Threshold, "plain", (0.1, -1.0), (2, 4, 3)),
    Case(nn.Softmax2d, "plain", (), (2, 4, 3, 2)),
]
_NORM_CASES = [
    Case(nn.LayerNorm, "plain", (4,), (2, 3, 4)),
    Case(nn.LayerNorm, "shape", ((3, 4), 1e-3, False), (2, 3, 4)),
    Case(nn.RMSNorm, "plain", (4,), (2, 3, 4)),
    Case(nn.GroupNorm, "plain", (2, 4), (2, 4, 3)),
    Case(nn.LocalResponseNorm, "plain", (2,), (2, 4, 3, 3)),
    *(Case(getattr(nn, f"BatchNorm{d}d"), "plain", (4,), (3, 4, *[2] * d)) for d in (1, 2, 3)),
    Case(nn.BatchNorm1d, "no statistics", (4, 1e-3, 0.2, False, False), (3, 4)),
    Case(nn.SyncBatchNorm, "plain", (4,), (3, 4, 2)),
]
_OTHER_POOL_CASES = [
    *(Case(getattr(nn, f"AdaptiveMaxPool{d}d"), "plain", (2,), (2, 3, *[6] * d)) for d in (1, 2, 3)),
    *(Case(getattr(nn, f"LPPool{d}d"), "plain", (2.0, 2), (2, 3, *[5] * d)) for d in (1, 2, 3)),
    *(Case(getattr(nn, f"FractionalMaxPool{d}d"), "plain", (2, 3), (2, 3, *[5] * d)) for d in (2, 3)),
    Case(nn.AdaptiveMaxPool2d, "indices", (2, True), (2, 3, 5, 5)),
]
CASES = [
    *_LINEAR_CASES,
    *_BILINEAR_CASES,
    *_EMBEDDING_CASES,
    *_ATTENTION_CASES,
    *_ACTIVATION_CASES,
    *_NORM_CASES,
    *_OTHER_POOL_CASES,
    *(
        case
        for d in (1, 2, 3)
        for cases in (_conv_cases, _conv_transpose_cases, _pool_cases, _instance_norm_cases)
        for case in cases(d)
    ),
]
_IN_A_BATTERY_OF_THEIR_OWN = {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
FIRST = list({case.float_class: case for case in reversed(CASES)}.values())
WEIGHTED = [case for case in CASES if issubclass(case.quantized_class, QuantMixin)]
FIRST_WEIGHTED = [case for case in FIRST if case in WEIGHTED]
WITH_INPUT = [case for case in FIRST if case.quantized_class.input_names]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", FIRST, ids=str)
every_class_with_input = pytest.mark.parametrize("case", WITH_INPUT, ids=str)
every_weighted_class = pytest.mark.parametrize("case", FIRST_WEIGHTED, ids=str)


def test_every_registered_class_is_here() -> None:
    everything = {float_class for float_class, _ in registered()}
    assert {case.float_class for case in CASES} == everything - _IN_A_BATTERY_OF_THEIR_OWN


# What torch's own module does stays as it is.


@every_case
def test_quantizers_off_is_bit_identical_to_torch(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable()
    inputs = case.inputs()
    assert_same(case.run(quantized, inputs), case.run(float_module, inputs))


@every_case
def test_gradients_with_quantizers_off_are_torchs(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable_quant()
    inputs = case.inputs()
    assert_same(*(gradients(case, module, module, inputs) for module in (quantized, float_module)))


@every_case
def test_constructor_sets_what_torchs_sets(case):
    assert plain_attributes(case.quantized()) == plain_attributes(case.float_class(*case.args, **case.kwargs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_weighted_class
def test_dtype_argument(case, dtype):
    module = case.quantized_class(*case.args, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


@every_weighted_class
def test_device_argument(case):
    module = case.quantized_class(*case.args, device="meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


@every_class
def test_unknown_argument_is_torchs_error(case):
    with pytest.raises(TypeError, match="nonsense"):
        case.quantized(nonsense=1)


# What is quantized.


@pytest.mark.parametrize("case", [case for case in CASES if case.quantizes_arguments], ids=str)
def test_quantized_forward_is_float_forward_on_the_grid(case):
    module, inputs = case.calibrated()
    expected = case.float_class(*case.args, **case.kwargs)
    expected.load_state_dict(torch_state(module))
    if isinstance(module, QuantMixin):
        put_on_grid(expected.weight, module.weight_quantizer)
        expected.max_norm = None  # it was applied when the module was calibrated
    on_grid = [None if x is None else x.clone() for x in inputs]
    for x, quantizer in zip(on_grid, module.input_quantizers(), strict=False):
        put_on_grid(x, quantizer)
    assert_same(case.run(module, inputs), case.run(expected, tuple(on_grid)))


@pytest.mark.parametrize("case", [case for case in FIRST_WEIGHTED if case.quantizes_arguments], ids=str)
def test_dynamic_ranges_are_those_of_the_tensors(case):
    module, inputs = case.quantized(), case.inputs()
    dynamic = case.run(module, inputs)
    pairs = [*zip(module.input_quantizers(), inputs, strict=False), (module.weight_quantizer, module.weight.detach())]
    for quantizer, tensor in pairs:
        others = [i for i in range(tensor.ndim) if quantizer.axis is None or i != quantizer.axis]
        quantizer.amax = tensor.abs().amax(others, keepdim=quantizer.axis is not None)
    assert torch.equal(dynamic, case.run(module, inputs))


@pytest.mark.parametrize("case", [case for case in FIRST_WEIGHTED if hasattr(case.quantized(), "bias")], ids=str)
def test_bias_is_not_quantized(case):
    module, inputs = case.calibrated()
    before = case.run(module, inputs)
    with torch.no_grad():
        module.bias.copy_(torch.full_like(module.bias, 1e-4))
        without = copy.deepcopy(module)
        without.bias.zero_()
    changed = case.run(module, inputs)
    assert not torch.equal(changed, case.run(without, inputs)), "1e-4 is far below a step and would vanish"
    assert before.shape == changed.shape


@every_class
def test_default_input_grid(case):
    grids = [quantizer.descriptor for quantizer in case.quantized().input_quantizers()]
    assert grids == [QUANT_DESC_8BIT_PER_TENSOR] * len(case.quantized_class.input_names)


@every_weighted_class
def test_default_weight_grid(case):
    axis = 1 if "Transpose" in case.float_class.__name__ else 0
    grids = {quantizer.descriptor for _, quantizer in case.quantized().weight_quantizers()}
    assert grids == {QuantDescriptor(8, axis=axis, narrow_range=True)}


@pytest.mark.parametrize("d", [1, 2, 3])
def test_transposed_weight_has_a_range_per_channel_of_a_group(d):
    module = getattr(fakequant.nn, f"QuantConvTranspose{d}d")(4, 6, 3, groups=2)
    fakequant.calibrate(module, [torch.randn(1, 4, *[4] * d)], progress=False)
    assert module.weight_quantizer.amax.shape == (1, 3, *[1] * d)


@every_class_with_input
def test_input_descriptor_argument(case):
    descriptor = QuantDescriptor(4, unsigned=True)
    module = case.quantized(quant_desc_input=descriptor)
    assert {quantizer.descriptor for quantizer in module.input_quantizers()} == {descriptor}


@every_weighted_class
def test_weight_descriptor_argument(case):
    descriptor = QuantDescriptor(4)
    module = case.quantized(quant_desc_weight=descriptor)
    assert {quantizer.descriptor for _, quantizer in module.weight_quantizers()} == {descriptor}


@pytest.mark.parametrize("case", [case for case in FIRST if case not in WITH_INPUT], ids=str)
def test_input_descriptor_needs_an_input(case):
    with pytest.raises(TypeError, match="quant_desc_input"):
        case.quantized(quant_desc_input=QuantDescriptor(8))


@pytest.mark.parametrize("case", [case for case in FIRST if case not in WEIGHTED], ids=str)
def test_weight_descriptor_needs_a_weight(case):
    with pytest.raises(TypeError, match="quant_desc_weight"):
        case.quantized(quant_desc_weight=QuantDescriptor(8))


@every_class_with_input
def test_real_quantization_is_refused_inside_a_module(case):
    with pytest.raises(InvalidValueError, match=r"quant_desc_input: expected fake_quant=True"):
        case.quantized(quant_desc_input=QuantDescriptor(fake_quant=False))


@every_weighted_class
def test_real_quantization_of_the_weight_is_refused(case):
    with pytest.raises(InvalidValueError, match=r"quant_desc_weight: expected fake_quant=True"):
        case.quantized(quant_desc_weight=QuantDescriptor(fake_quant=False))


@pytest.mark.parametrize("name", ["quant_desc_input", "quant_desc_weight"])
def test_descriptor_of_another_type_is_refused(name):
    with pytest.raises(InvalidTypeError, match=rf"{name}: expected a QuantDescriptor, got 8"):
        QuantLinear(2, 2, **{name: 8})


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_class_default_is_used(kind, defaults):
    getattr(QuantConv2d, f"set_default_quant_desc_{kind}")(QuantDescriptor(5))
    assert getattr(QuantConv2d(1, 1, 1), f"{kind}_quantizer").num_bits == 5


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_class_default_is_of_that_class_only(kind, defaults):
    getattr(QuantConv2d, f"set_default_quant_desc_{kind}")(QuantDescriptor(5))
    assert getattr(QuantConv1d(1, 1, 1), f"{kind}_quantizer").num_bits == 8


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_class_default_of_another_type_is_refused(kind):
    with pytest.raises(InvalidTypeError, match=f"quant_desc_{kind}: expected a QuantDescriptor, got 'int8'"):
        getattr(QuantConv2d, f"set_default_quant_desc_{kind}")("int8")


# An ordinary module.


@every_case
def test_state_dict_keys_are_torchs_and_the_ranges(case):
    float_keys = set(case.float_class(*case.args, **case.kwargs).state_dict())
    module = case.quantized()
    tensors = [*module.input_names, *(module.weight_names if case in WEIGHTED else ())]
    ranges = {f"_{name}_quantizer._amax" for name in tensors}
    if case.float_class is nn.MultiheadAttention:
        ranges |= {f"out_proj._{name}_quantizer._amax" for name in ("input", "weight")}
    assert set(module.state_dict()) == float_keys | ranges


@every_class
def test_float_state_dict_loads_strictly(case):
    state = case.float_class(*case.args, **case.kwargs).state_dict()
    quantized = case.quantized()
    quantized.load_state_dict(state, strict=True)
    assert all(torch.equal(quantized.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "copied",
    [
        lambda module, case: copy.deepcopy(module),
        lambda module, case: pickle.loads(pickle.dumps(module)),
        lambda module, case: loaded(case.quantized(), through_a_file(module.state_dict())),
    ],
    ids=["deepcopy", "pickle", "weights_only state_dict"],
)
@every_class
def test_a_copy_gives_the_same(case, copied):
    module, inputs = case.calibrated()
    assert_same(case.run(copied(module, case), inputs), case.run(module, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_class
def test_dtype_of_the_output_is_that_of_the_float_module(case, dtype):
    module, inputs = case.calibrated()
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    try:
        expected = first(case.run(case.float_class(*case.args, **case.kwargs).to(dtype), inputs)).dtype
    except NotImplementedError:
        pytest.skip("torch has no such module of this dtype on a CPU")
    assert expected == dtype
    assert first(case.run(module.to(dtype), inputs)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_class
def test_ranges_stay_float32(case, dtype):
    module, _ = case.calibrated()
    assert {quantizer.amax.dtype for quantizer in quantizers(module.to(dtype))} == {torch.float32}


@every_class
def test_autocast_gives_torchs_dtype(case):
    float_module, quantized = case.pair()
    inputs = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first(case.run(quantized, inputs)).dtype == first(case.run(float_module, inputs)).dtype


@pytest.mark.parametrize("case", [case for case in FIRST if case.float_class is not nn.RReLU], ids=str)
def test_gradient_checkpointing_gives_the_same_gradient(case):  # torch 2.13: that of nn.RReLU differs in float, too
    module, inputs = case.calibrated()
    checkpointed = functools.partial(checkpoint, module, use_reentrant=False)
    assert_same(*(gradients(case, module, function, inputs) for function in (module, checkpointed)))


@every_class
def test_forward_hooks_run(case):
    module, calls = case.quantized(), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    case.run(module, case.inputs())
    assert calls == ["before", "after"]


@every_class
def test_dequantize_gives_exactly_the_float_class_back(case):
    assert type(fakequant.dequantize(case.quantized())) is case.float_class


@every_case
def test_dequantized_module_is_bit_identical_to_torch(case):
    float_module, quantized = case.pair()
    quantized, inputs = fakequant.dequantize(quantized), case.inputs()
    assert_same(case.run(quantized, inputs), case.run(float_module, inputs))


@every_class
def test_printing_shows_the_quantizers(case):
    lines = repr(case.quantized()).splitlines()
    assert sum("_quantizer): TensorQuantizer(8bit " in line for line in lines) == len(quantizers(case.quantized()))


# torch 2.13: dynamo itself instantiates the autograd.Function that it traces.


@every_class
def test_compiled_without_graph_break_gives_the_same(case):
    module, inputs = case.calibrated()
    # torch 2.13: aot_eager fails for the gradient of any hardtanh behind a transposed view; inductor does not.
    backend = "eager" if case.float_class is nn.MultiheadAttention else "aot_eager"
    torch.compiler.reset()  # dozens of classes share one forward, which torch compiles for eight at most
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_same(*(gradients(case, module, function, inputs) for function in (module, compiled)))


def test_inductor_gives_the_same_within_a_step():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.InstanceNorm2d(4),
        nn.ConvTranspose2d(4, 4, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule(type="AvgPool2d"))
    x = torch.randn(2, 3, 7, 7)
    fakequant.calibrate(model, [x], progress=False)
    eager, compiled = model(x), torch.compile(model, fullgraph=True)(x)
    # An element that lands on another code moves an output by a step of the input times a weight.
    step = model[-1].input_quantizer.scale * model[-1].weight.abs().max()
    assert (eager - compiled).abs().max() <= step


@every_class
def test_torch_export_gives_the_same(case):
    module, inputs = case.calibrated()
    exported = torch.export.export(module.eval(), inputs).module()
    assert_same(case.run(exported, inputs), case.run(module, inputs))


# Neither of torch's exporters has an ONNX form of their function.
_NOT_IN_ONNX = {nn.FractionalMaxPool2d, nn.FractionalMaxPool3d}
# The exporter of older opsets, which takes a tenth of the time, does not know these.
_IN_NEW_OPSETS = {nn.Bilinear, nn.RMSNorm, nn.Threshold}


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("case", [case for case in FIRST if case.float_class not in _NOT_IN_ONNX], ids=str)
def test_file_gives_the_same(case, target, tmp_path):
    module, inputs = case.calibrated()
    expected = first(case.run(module.eval(), inputs)).detach().numpy()
    opset = 20 if case.float_class in _IN_NEW_OPSETS else 17
    fakequant.export_onnx(module, inputs, tmp_path / "layer.onnx", target=target, opset=opset)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found, *_ = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    # A hundredth of a step of 8 bits: on ONNX Runtime biases of linear layers are int32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=np.abs(expected).max() / 12700)


# How the battery looks at modules.


@pytest.fixture
def defaults(monkeypatch):
    """Restore the class defaults afterwards."""
    for name in ("default_quant_desc_input", "default_quant_desc_weight"):
        monkeypatch.setattr(QuantConv2d, name, getattr(QuantConv2d, name))


def quantizers(module: nn.Module) -> list[fakequant.TensorQuantizer]:
    return [child for child in module.modules() if isinstance(child, fakequant.TensorQuantizer)]


def put_on_grid(tensor: Tensor, quantizer: fakequant.TensorQuantizer) -> None:
    """Round a tensor in place to the grid of a calibrated quantizer, by the definition and in NumPy."""
    low = -127 if quantizer.narrow_range else -128
    amax = quantizer.amax.numpy()
    scale = np.where(amax == 0, np.float32(1), amax / np.float32(127))  # of zeros, such as a padding row
    codes = np.clip(np.rint(tensor.detach().numpy() / scale), low, 127)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(codes * scale))


def torch_state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if "quantizer" not in key}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if not name.startswith(("_modules", "_buffers", "_param"))
    }


def gradients(case: Case, module: nn.Module, function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradients of inputs and parameters from a weighted sum of the output, the same one in every call."""
    leaves = {id(x): x.clone().requires_grad_() for x in inputs if x is not None and x.is_floating_point()}
    y = first(case.run(function, tuple(leaves.get(id(x), x) for x in inputs)))
    tensors = [*leaves.values(), *module.parameters()]
    found = torch.autograd.grad((y * torch.randn_like(y)).sum(), tensors, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad.to_dense() for grad in found]


def first(outputs: Any) -> Tensor:
    """Return the output, or the first of several: (values, indices) of a max pool, (output, weights) of attention."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit; also for several outputs."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module
