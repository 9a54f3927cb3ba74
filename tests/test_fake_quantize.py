import ml_dtypes
import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fakequant.fake_quantize import fake_quantize, fake_quantize_float, straight_through

GRIDS = {"int8": (-128, 127), "int8-narrow": (-127, 127), "uint8": (0, 255), "int4": (-8, 7)}
grids = pytest.mark.parametrize(("low", "high"), GRIDS.values(), ids=GRIDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

# Above two million elements an implementation may go by pieces; first axes that are short, long and odd.
LARGE = [(2**21 + 3,), (1, 2**21 + 3), (3, 700_001), (1000, 3, 701), (2, 3, 600, 601)]


def expected_values(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """DequantizeLinear(QuantizeLinear(x)) of the ONNX specification in float32, rounded once to x's dtype."""
    array, step = x.detach().to(torch.float32).numpy(), scale.numpy()
    return torch.from_numpy(np.clip(np.rint(array / step), low, high).astype(np.float32) * step).to(x.dtype)


def gradient(x: torch.Tensor, scale: torch.Tensor, low: int, high: int, upstream: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().clone().requires_grad_()
    fake_quantize(leaf, scale, low, high).backward(upstream)
    assert leaf.grad is not None
    return leaf.grad


def away_from_ties(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Move the few elements between two codes onto a code: there any choice is right."""
    codes = x / scale
    return torch.where((codes.frac().abs() - 0.5).abs() < 1e-3, codes.round() * scale, x)


@grids
@dtypes
def test_values_are_those_of_the_specification(dtype, low, high):
    x, scale = (torch.randn(10_000, dtype=torch.float64) * 3).to(dtype), torch.tensor(2.2 / high)
    result = fake_quantize(x, scale, low, high)
    assert result.dtype == dtype
    assert torch.equal(result, expected_values(x, scale, low, high))


@pytest.mark.parametrize("axis", [0, 1, 3])
@grids
@dtypes
def test_values_per_channel_are_those_of_the_specification(dtype, low, high, axis):
    x = (torch.randn(5, 6, 7, 8, dtype=torch.float64) * 3).to(dtype)
    shape = [1] * 4
    shape[axis] = x.shape[axis]
    scale = (torch.rand(shape) + 0.1) / high
    assert torch.equal(fake_quantize(x, scale, low, high), expected_values(x, scale, low, high))


@pytest.mark.parametrize("per_channel", [False, True], ids=["per-tensor", "per-channel"])
@layouts
def test_values_do_not_depend_on_the_layout(layout, per_channel):
    x = layout(torch.randn(4, 6, 8, 10))
    scale = torch.rand(1, x.shape[1], 1, 1) / 100 if per_channel else torch.tensor(0.01)
    assert torch.equal(fake_quantize(x, scale, -128, 127), expected_values(x, scale, -128, 127))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per-tensor", "per-channel"])
@dtypes
def test_channels_last_stays_channels_last(dtype, per_channel, requires_grad):
    x = torch.randn(2, 6, 5, 5).to(dtype, memory_format=torch.channels_last).requires_grad_(requires_grad)
    scale = torch.rand(6, 1, 1) + 0.01 if per_channel else torch.tensor(0.01)
    assert fake_quantize(x, scale, -128, 127).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_values_of_a_large_tensor(shape):
    x, scale = torch.randn(shape), torch.tensor(0.01)
    assert torch.equal(fake_quantize(x, scale, -128, 127), expected_values(x, scale, -128, 127))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_values_of_a_large_tensor_per_channel(axis):
    x = torch.randn(300, 100, 71)
    scale = torch.rand([size if i == axis else 1 for i, size in enumerate(x.shape)]) / 50
    assert torch.equal(fake_quantize(x, scale, -128, 127), expected_values(x, scale, -128, 127))


@layouts
def test_values_of_a_large_tensor_do_not_depend_on_the_layout(layout):
    x, scale = layout(torch.randn(4, 8, 512, 513)), torch.tensor(0.01)
    assert torch.equal(fake_quantize(x, scale, -128, 127), expected_values(x, scale, -128, 127))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_an_empty_tensor_stays_empty(shape):
    assert fake_quantize(torch.empty(shape), torch.tensor(1.0), -128, 127).shape == shape


def test_an_empty_tensor_has_an_empty_gradient():
    x = torch.empty(2, 0)
    assert gradient(x, torch.tensor(1.0), -128, 127, x).shape == (2, 0)


def test_a_number_stays_a_number():
    assert fake_quantize(torch.tensor(0.26), torch.tensor(0.5), -128, 127).shape == ()


def test_nan_stays_nan():
    assert fake_quantize(torch.tensor(torch.nan), torch.tensor(0.5), -128, 127).isnan()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@dtypes
def test_the_input_is_not_modified(dtype, requires_grad):
    before = torch.randn(1000).to(dtype)
    x = before.clone().requires_grad_(requires_grad)
    fake_quantize(x, torch.tensor(0.01), -128, 127).clone().zero_()
    assert torch.equal(x.detach(), before)


def test_the_result_shares_no_memory_with_the_input():
    x = torch.zeros(4)
    fake_quantize(x, torch.tensor(1.0), -128, 127).fill_(9.0)
    assert not x.any()


@grids
def test_gradient_is_that_of_torch(low, high):
    scale = torch.tensor(2.0 / high)
    x, upstream = away_from_ties(torch.randn(20_000) * 3, scale), torch.randn(20_000)
    reference = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(reference, scale.item(), 0, low, high).backward(upstream)
    assert torch.equal(gradient(x, scale, low, high, upstream), reference.grad)


@pytest.mark.parametrize("axis", [0, 1])
@grids
def test_gradient_per_channel_is_that_of_torch(low, high, axis):
    shape = [6 if i == axis else 1 for i in range(3)]
    scale = (torch.rand(shape) + 0.5) / high
    x, upstream = away_from_ties(torch.randn(6, 6, 300) * 2, scale), torch.randn(6, 6, 300)
    reference = x.clone().requires_grad_()
    torch.fake_quantize_per_channel_affine(
        reference, scale.flatten(), torch.zeros(6, dtype=torch.int32), axis, low, high
    ).backward(upstream)
    assert torch.equal(gradient(x, scale, low, high, upstream), reference.grad)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_gradient_of_a_large_tensor(shape):
    scale = torch.tensor(1 / 127)
    x, upstream = away_from_ties(torch.randn(shape), scale), torch.randn(shape)
    codes = (x / scale).round()
    expected = torch.where((codes >= -128) & (codes <= 127), upstream, 0.0)
    assert torch.equal(gradient(x, scale, -128, 127, upstream), expected)


def test_gradient_of_a_large_tensor_per_channel():
    scale = (torch.rand(1, 100, 1) + 0.5) / 127
    x, upstream = away_from_ties(torch.randn(300, 100, 71), scale), torch.randn(300, 100, 71)
    codes = (x / scale).round()
    expected = torch.where((codes >= -128) & (codes <= 127), upstream, 0.0)
    assert torch.equal(gradient(x, scale, -128, 127, upstream), expected)


@layouts
def test_gradient_does_not_depend_on_the_layout(layout):
    scale = torch.tensor(0.01)
    x = layout(away_from_ties(torch.randn(4, 6, 8, 10), scale))
    codes = (x / scale).round()
    expected = ((codes >= -128) & (codes <= 127)).float()
    assert torch.equal(gradient(x, scale, -128, 127, torch.ones_like(x)), expected)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize(
    ("step", "passes"),
    [
        (127.0, True),
        (127.49, True),
        (127.51, False),
        (128.0, False),
        (torch.inf, False),
        (0.0, True),
        (-127.0, True),
        (-128.0, True),
        (-128.49, True),
        (-128.51, False),
        (-torch.inf, False),
    ],
)
def test_gradient_at_the_edges_of_the_int8_grid(step, passes, per_channel):
    scale = torch.tensor([[0.0317], [0.7]]) if per_channel else torch.tensor(0.0317)
    x = torch.full((2, 1), step) * scale
    assert gradient(x, scale, -128, 127, torch.ones(2, 1)).tolist() == [[float(passes)]] * 2


@pytest.mark.parametrize(
    ("low", "high", "step", "passes"),
    [
        (-127, 127, -127.49, True),
        (-127, 127, -127.51, False),
        (0, 255, -0.49, True),
        (0, 255, -0.51, False),
        (0, 255, 255.49, True),
        (0, 255, 255.51, False),
    ],
)
def test_gradient_at_the_edges_of_other_grids(low, high, step, passes):
    scale = torch.tensor(0.0317)
    assert gradient(step * scale, scale, low, high, torch.tensor(1.0)) == float(passes)


def test_the_largest_element_gets_its_gradient():
    for seed in range(100):
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        amax = x.abs().max()
        assert gradient(x, amax / 127, -128, 127, torch.ones(64)).all()


@dtypes
def test_gradient_keeps_the_dtype(dtype):
    x = torch.randn(10).to(dtype)
    grad = gradient(x, torch.tensor(0.1), -128, 127, torch.full_like(x, 2.0))
    assert grad.dtype == dtype
    assert (grad == 2.0).all()


def test_scale_gets_no_gradient():
    x, scale = torch.randn(10, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, scale, -128, 127).sum().backward()
    assert scale.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(("context", "kept"), [(torch.no_grad, False), (torch.enable_grad, True)])
def test_tensors_are_saved_only_for_a_gradient(context, kept):
    saved = []
    x = torch.randn(10, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor), context():
        result = fake_quantize(x, torch.tensor(0.1), -128, 127)
    assert (bool(saved), result.requires_grad) == (kept, kept)


def test_nothing_of_the_size_of_the_data_is_saved_beside_the_input():
    saved = []
    x = torch.randn(1000, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x, torch.tensor(0.1), -128, 127)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() == 1000] == [x.data_ptr()]


@pytest.fixture(scope="module")
def compiled():
    """fake_quantize compiled once for all its tests, with gradient, per tensor and per channel."""
    torch._dynamo.reset()
    return torch.compile(fake_quantize, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per-tensor", "per-channel"])
def test_compiled_gives_the_same_codes_and_gradient(compiled, per_channel):
    scale = torch.rand(6, 1) / 50 + 0.01 if per_channel else torch.tensor(0.0173)
    x, upstream = away_from_ties(torch.randn(6, 500), scale), torch.randn(6, 500)
    leaf = x.clone().requires_grad_()
    values = compiled(leaf, scale, -128, 127)
    values.backward(upstream)
    expected = (fake_quantize(x, scale, -128, 127) / scale).round()
    assert torch.equal((values.detach() / scale).round(), expected)
    assert torch.equal(leaf.grad, gradient(x, scale, -128, 127, upstream))


def test_exported_gives_the_same_values():
    class Model(torch.nn.Module):
        def forward(self, x):
            return fake_quantize(x, torch.full((3, 1), 0.01), -128, 127)

    x = torch.randn(3, 100)
    program = torch.export.export(Model(), (x,), strict=False)
    assert torch.equal(program.module()(x), Model()(x))


def test_straight_through_returns_the_value():
    x, value = torch.randn(5, requires_grad=True), torch.randn(5)
    assert torch.equal(straight_through(x, value, torch.ones(5, dtype=torch.bool)), value)


def test_straight_through_without_a_mask_passes_the_gradient():
    x = torch.randn(2, requires_grad=True)
    straight_through(x, torch.zeros(2)).backward(torch.tensor([2.0, torch.inf]))
    assert x.grad.tolist() == [2.0, torch.inf]


def test_straight_through_masks_the_gradient():
    x = torch.randn(3, requires_grad=True)
    straight_through(x, torch.zeros(3), torch.tensor([True, False, True])).backward(torch.tensor([2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [2.0, 0.0, 4.0]


def expected_e4m3(x: np.ndarray, scale: float) -> np.ndarray:
    """E4M3 of the ml_dtypes package, saturating, in float32."""
    scaled = np.clip(x.astype(np.float32) / np.float32(scale), -448, 448)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("scale", [1.0, 0.0123])
def test_e4m3_values_are_those_of_ml_dtypes(scale):
    x = torch.cat([torch.randn(10_000) * 200 * scale, torch.logspace(-12, 5, 10_000), torch.tensor([0.0, torch.inf])])
    result = fake_quantize_float(x, torch.tensor(scale), (4, 3))
    assert np.array_equal(result.numpy(), expected_e4m3(x.numpy(), scale))


def test_every_e4m3_number_stays_as_it_is():
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = torch.from_numpy(numbers[~np.isnan(numbers)])
    assert len(x) == 254
    assert torch.equal(fake_quantize_float(x, torch.tensor(1.0), (4, 3)), x)


@dtypes
def test_e4m3_keeps_the_dtype(dtype):
    x = torch.tensor([1.8, -3.3], dtype=dtype)
    result = fake_quantize_float(x, torch.tensor(1.0), (4, 3))
    assert result.dtype == dtype
    assert result.tolist() == [1.75, -3.25]


floats = pytest.mark.parametrize(("num_bits", "high"), [((4, 3), 448), ((5, 2), 57344), ((2, 1), 6)], ids=str)


@floats
@dtypes
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.full((5,), 0.5)], ids=["tensor", "channel"])
def test_a_float_gradient_passes_up_to_the_largest_number(num_bits, high, scale, dtype):
    x = torch.tensor([-1.01, -1.0, 0.0, 1.0, 1.01]).mul(high / 2).to(dtype).requires_grad_()
    fake_quantize_float(x, scale, num_bits).backward(torch.tensor([torch.inf, 3.0, 3.0, 3.0, torch.nan], dtype=dtype))
    assert x.grad.tolist() == [0.0, 3.0, 3.0, 3.0, 0.0]
    assert x.grad.dtype == dtype


@floats
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_float_range_has_a_gradient_at_its_end_however_its_scale_is_rounded(num_bits, high, per_channel):
    ends = torch.rand(100) + 0.5
    for x in (ends,) if per_channel else ends:
        leaf = x.clone().requires_grad_()
        fake_quantize_float(leaf, x / high, num_bits).sum().backward()
        assert leaf.grad.all()


@pytest.mark.parametrize("num_bits", [(4, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.full((4, 1), 0.01)], ids=["tensor", "channel"])
def test_a_compiled_float_operator_is_one_graph_with_the_same_gradient(num_bits, scale):
    torch.compiler.reset()
    x = torch.linspace(-6, 6, 32).reshape(4, 8).requires_grad_()
    values = torch.compile(fake_quantize_float, fullgraph=True, backend="aot_eager")(x, scale, num_bits)
    expected = fake_quantize_float(x, scale, num_bits)
    assert torch.equal(values, expected)
    assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v in (values, expected)))
