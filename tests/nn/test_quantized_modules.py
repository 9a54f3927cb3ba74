"""One battery for every registered quantized class, each with several constructor variants."""

import copy
import dataclasses
import functools
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

import fakequant
from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import QuantConv1d, QuantConv2d, QuantLinear, QuantMixin, registered


@dataclasses.dataclass(frozen=True)
class Case:
    """A class, how it is made, and what it is called with."""

    float_class: type[nn.Module]
    label: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def quantized_class(self) -> Any:
        return dict(registered())[self.float_class]

    def quantized(self, **kwargs: Any) -> Any:
        return self.quantized_class(*self.args, **self.kwargs, **kwargs)

    def calibrated(self) -> tuple[Any, Tensor]:
        """Return a quantized module with fixed ranges that clip a little, and an input."""
        module, x = self.quantized(), self.input()
        module.input_quantizer.amax = 0.7 * x.abs().max()
        if isinstance(module, QuantMixin):
            axis = module.weight_quantizer.axis
            others = [i for i in range(module.weight.ndim) if i != axis]
            module.weight_quantizer.amax = 0.9 * module.weight.detach().abs().amax(others, keepdim=True)
        return module, x

    def pair(self) -> tuple[nn.Module, Any]:
        """Return a float module and a quantized one with the same parameters."""
        float_module, quantized = self.float_class(*self.args, **self.kwargs), self.quantized()
        quantized.load_state_dict(float_module.state_dict())
        return float_module, quantized

    def input(self) -> Tensor:
        return torch.randn(self.shape)

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
        Case(adaptive, "plain", (2,), shape),
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
CASES = [
    *_LINEAR_CASES,
    *(
        case
        for d in (1, 2, 3)
        for cases in (_conv_cases, _conv_transpose_cases, _pool_cases, _instance_norm_cases)
        for case in cases(d)
    ),
]
FIRST = list({case.float_class: case for case in reversed(CASES)}.values())
WEIGHTED = [case for case in CASES if issubclass(case.quantized_class, QuantMixin)]
FIRST_WEIGHTED = [case for case in FIRST if case in WEIGHTED]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", FIRST, ids=str)
every_weighted_class = pytest.mark.parametrize("case", FIRST_WEIGHTED, ids=str)


def test_every_registered_class_is_here() -> None:
    assert {case.float_class for case in CASES} == {float_class for float_class, _ in registered()}


# What torch's own module does stays as it is.


@every_case
def test_quantizers_off_is_bit_identical_to_torch(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable()
    x = case.input()
    assert_same(quantized(x, **case.call), float_module(x, **case.call))


@every_case
def test_gradients_with_quantizers_off_are_torchs(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable_quant()
    grads = [input_gradient(module, case.input, case.call) for module in (float_module, quantized)]
    assert torch.equal(*grads)


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


@every_case
def test_quantized_forward_is_float_forward_on_the_grid(case):
    module, x = case.calibrated()
    expected = case.float_class(*case.args, **case.kwargs)
    expected.load_state_dict(torch_state(module))
    if isinstance(module, QuantMixin):
        put_on_grid(expected.weight, module.weight_quantizer)
    put_on_grid(x_on_grid := x.clone(), module.input_quantizer)
    assert_same(module(x, **case.call), expected(x_on_grid, **case.call))


@every_weighted_class
def test_dynamic_ranges_are_those_of_the_tensors(case):
    module, x = case.quantized(), case.input()
    dynamic = module(x, **case.call)
    for quantizer, tensor in ((module.input_quantizer, x), (module.weight_quantizer, module.weight.detach())):
        others = [i for i in range(tensor.ndim) if quantizer.axis is None or i != quantizer.axis]
        quantizer.amax = tensor.abs().amax(others, keepdim=quantizer.axis is not None)
    assert torch.equal(dynamic, module(x, **case.call))


@every_weighted_class
def test_bias_is_not_quantized(case):
    module, x = case.calibrated()
    before = module(x, **case.call)
    with torch.no_grad():
        module.bias.copy_(torch.full_like(module.bias, 1e-4))
        without = copy.deepcopy(module)
        without.bias.zero_()
    assert not torch.equal(module(x), without(x)), "1e-4 is far below a step and would vanish"
    assert before.shape == module(x).shape


@every_class
def test_default_input_grid(case):
    assert case.quantized().input_quantizer.descriptor == QUANT_DESC_8BIT_PER_TENSOR


@every_weighted_class
def test_default_weight_grid(case):
    axis = 1 if "Transpose" in case.float_class.__name__ else 0
    assert case.quantized().weight_quantizer.descriptor == QuantDescriptor(8, axis=axis, narrow_range=True)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_transposed_weight_has_a_range_per_channel_of_a_group(d):
    module = getattr(fakequant.nn, f"QuantConvTranspose{d}d")(4, 6, 3, groups=2)
    fakequant.calibrate(module, [torch.randn(1, 4, *[4] * d)], progress=False)
    assert module.weight_quantizer.amax.shape == (1, 3, *[1] * d)


@every_class
def test_input_descriptor_argument(case):
    descriptor = QuantDescriptor(4, unsigned=True)
    assert case.quantized(quant_desc_input=descriptor).input_quantizer.descriptor == descriptor


@every_weighted_class
def test_weight_descriptor_argument(case):
    descriptor = QuantDescriptor(4)
    assert case.quantized(quant_desc_weight=descriptor).weight_quantizer.descriptor == descriptor


@pytest.mark.parametrize("case", [case for case in FIRST if case not in WEIGHTED], ids=str)
def test_weight_descriptor_needs_a_weight(case):
    with pytest.raises(TypeError, match="quant_desc_weight"):
        case.quantized(quant_desc_weight=QuantDescriptor(8))


@every_class
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
    ranges = {"_input_quantizer._amax"} | ({"_weight_quantizer._amax"} if case in WEIGHTED else set())
    assert set(case.quantized().state_dict()) == float_keys | ranges


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
    module, x = case.calibrated()
    assert_same(copied(module, case)(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_class
def test_dtype_of_the_output_is_that_of_the_input(case, dtype):
    if case.float_class is nn.AvgPool3d and dtype != torch.float64:
        pytest.skip("torch has no AvgPool3d of this dtype on a CPU")
    module, x = case.calibrated()
    assert module.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_class
def test_ranges_stay_float32(case, dtype):
    module, _ = case.calibrated()
    assert {quantizer.amax.dtype for quantizer in quantizers(module.to(dtype))} == {torch.float32}


@every_class
def test_autocast_gives_torchs_dtype(case):
    float_module, quantized = case.pair()
    x = case.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantized(x).dtype == float_module(x).dtype


@every_class
def test_gradient_checkpointing_gives_the_same_gradient(case):
    module, x = case.calibrated()
    checkpointed = functools.partial(checkpoint, module, use_reentrant=False)
    grads = [input_gradient(function, x.clone, {}) for function in (module, checkpointed)]
    assert torch.equal(*grads)


@every_class
def test_forward_hooks_run(case):
    module, calls = case.quantized(), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module(case.input())
    assert calls == ["before", "after"]


@every_class
def test_dequantize_gives_exactly_the_float_class_back(case):
    assert type(fakequant.dequantize(case.quantized())) is case.float_class


@every_case
def test_dequantized_module_is_bit_identical_to_torch(case):
    float_module, quantized = case.pair()
    quantized, x = fakequant.dequantize(quantized), case.input()
    assert_same(quantized(x, **case.call), float_module(x, **case.call))


@every_class
def test_printing_shows_the_quantizers(case):
    assert "_input_quantizer): TensorQuantizer(8bit fake per-tensor" in repr(case.quantized())


_FAMILIES = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d, nn.AvgPool2d, nn.InstanceNorm2d)
one_of_each_family = pytest.mark.parametrize("case", [case for case in FIRST if case.float_class in _FAMILIES], ids=str)


# torch 2.13: dynamo itself instantiates the autograd.Function that it traces.


@one_of_each_family
def test_compiled_without_graph_break_gives_the_same(case):
    module, x = case.calibrated()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = [input_gradient(function, x.clone, {}) for function in (module, compiled)]
    assert torch.equal(*grads)


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


@one_of_each_family
def test_torch_export_gives_the_same(case):
    module, x = case.calibrated()
    exported = torch.export.export(module.eval(), (x,)).module()
    assert torch.equal(exported(x), module(x))


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
    scale = quantizer.amax.numpy() / np.float32(127)
    codes = np.clip(np.rint(tensor.detach().numpy() / scale), low, 127)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(codes * scale))


def torch_state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if "quantizer" not in key}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if not name.startswith(("_modules", "_buffers", "_param"))
    }


def input_gradient(function: Any, make_input: Any, call: dict[str, Any]) -> Tensor:
    """Return the gradient of a weighted sum of the output; the same weights and input in every call."""
    torch.manual_seed(1)
    x = make_input().requires_grad_()
    y = function(x, **call)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.randn_like(y)).sum().backward()
    return x.grad


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit; also for the (values, indices) of a max pool."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module
