import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fakequant import arithmetic
from fakequant.errors import InvalidTypeError, InvalidValueError

GRIDS = {"int8": (-128, 127), "int8-narrow": (-127, 127), "uint8": (0, 255), "int4": (-8, 7), "int16": (-32768, 32767)}
grids = pytest.mark.parametrize(("low", "high"), GRIDS.values(), ids=GRIDS)

scales = st.floats(2.0**-60, 2.0**60, width=32)
# As many steps as reach beyond the largest grid, so that clamped values are among them.
steps = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**17), 2.0**17, width=32))


def expected_codes(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """QuantizeLinear of the ONNX specification with zero point 0, in float32."""
    return np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), low, high).astype(np.float32)


def onnx_codes_and_values(x: np.ndarray, scale: np.ndarray, container: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """What ONNX Runtime's CPU kernels make of x."""
    shape = ",".join(map(str, x.shape))
    scale_shape = ",".join(map(str, scale.shape))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[{shape}] x, float[{scale_shape}] scale, {container}[{scale_shape}] zero)
            => ({container}[{shape}] codes, float[{shape}] values)
        {{
            codes = QuantizeLinear<axis = {axis}>(x, scale, zero)
            values = DequantizeLinear<axis = {axis}>(codes, scale, zero)
        }}""")
    scale = np.asarray(scale)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    zero = np.zeros(scale.shape, container)
    codes, values = session.run(None, {"x": x, "scale": scale, "zero": zero})
    return codes, values


@pytest.mark.parametrize(
    ("num_bits", "unsigned", "narrow", "bounds"),
    [
        (8, False, False, (-128, 127)),
        (8, False, True, (-127, 127)),
        (8, True, False, (0, 255)),
        (8, True, True, (0, 255)),
        (2, False, False, (-2, 1)),
        (2, False, True, (-1, 1)),
        (4, False, False, (-8, 7)),
        (4, True, False, (0, 15)),
        (16, False, False, (-32768, 32767)),
        (16, True, False, (0, 65535)),
    ],
)
def test_integer_bounds(num_bits, unsigned, narrow, bounds):
    assert arithmetic.integer_bounds(num_bits, unsigned, narrow) == bounds


def test_scale_is_amax_divided_by_the_bound_in_float32():
    amax = torch.rand(1000) * 100
    assert np.array_equal(arithmetic.scale_from_amax(amax, 127).numpy(), amax.numpy() / np.float32(127))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1, 1)], ids=str)
def test_scale_has_the_shape_of_amax(shape):
    assert arithmetic.scale_from_amax(torch.ones(shape), 127).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_scale_is_float32(dtype):
    scale = arithmetic.scale_from_amax(torch.tensor(127, dtype=dtype), 127)
    assert (scale.item(), scale.dtype) == (1.0, torch.float32)


def test_scale_has_no_gradient():
    assert not arithmetic.scale_from_amax(torch.ones(2, requires_grad=True), 127).requires_grad


@pytest.mark.parametrize("amax", [0.0, 2.0**-149, 2.0**-24], ids=["zero", "smallest-float32", "smallest-float16"])
def test_a_dead_range_has_the_smallest_normal_scale_of_float16(amax):
    scale = arithmetic.scale_from_amax(torch.tensor(amax), 127)
    assert scale.half().item() == scale.item() == torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize("bound", [1, 127, 255, 448, 65535])
def test_a_range_just_above_the_dead_ones_is_used_as_it_is(bound):
    amax = torch.nextafter(torch.tensor(2.0**-24), torch.tensor(1.0))
    scale = arithmetic.scale_from_amax(amax, bound).item()
    assert scale == np.float32(amax.item()) / np.float32(bound) > 0


def test_a_dead_channel_leaves_the_others_alone():
    assert arithmetic.scale_from_amax(torch.tensor([127.0, 0.0, 254.0]), 127).tolist() == [1.0, 2.0**-14, 2.0]


def test_ties_go_to_the_even_code():
    ties = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert arithmetic.quantize(ties, torch.tensor(1.0), -8, 7).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_it_divides_by_the_scale_and_does_not_multiply_by_the_reciprocal():
    scale = np.float32(0.037)
    # Halves of odd codes, where the last bit decides.
    x = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
    by_reciprocal = np.rint(x * (np.float32(1) / scale))
    codes = arithmetic.quantize(torch.from_numpy(x), torch.tensor(scale), -128, 127).numpy()
    assert np.array_equal(codes, expected_codes(x, scale, -128, 127))
    assert not np.array_equal(codes, by_reciprocal)


@grids
def test_codes_are_those_of_the_specification(low, high):
    scale = np.float32(0.037)
    x = (np.random.default_rng(0).normal(size=10_000) * scale * high).astype(np.float32)
    codes = arithmetic.quantize(torch.from_numpy(x), torch.tensor(scale), low, high).numpy()
    assert np.array_equal(codes, expected_codes(x, scale, low, high))
    assert (codes.min(), codes.max()) == (low, high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_codes_are_computed_in_float32_and_stay_in_it(dtype):
    x = (torch.randn(10_000, dtype=torch.float64) * 4).to(dtype)
    scale = np.float32(0.0317)
    codes = arithmetic.quantize(x, torch.tensor(scale), -128, 127)
    assert codes.dtype == torch.float32
    assert np.array_equal(codes.numpy(), expected_codes(x.double().numpy(), scale, -128, 127))


def test_nan_stays_nan():
    codes = arithmetic.quantize(torch.tensor([1.0, torch.nan]), torch.tensor(1.0), -128, 127)
    assert codes.isnan().tolist() == [False, True]


@grids
def test_inf_becomes_the_outermost_code(low, high):
    codes = arithmetic.quantize(torch.tensor([-torch.inf, torch.inf]), torch.tensor(1.0), low, high)
    assert codes.tolist() == [low, high]


def test_an_overflowing_quotient_becomes_the_outermost_code():
    codes = arithmetic.quantize(torch.tensor([-3e38, 3e38]), torch.tensor(1e-10), -128, 127)
    assert codes.tolist() == [-128, 127]


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_an_empty_tensor_has_empty_codes(shape):
    assert arithmetic.quantize(torch.empty(shape), torch.tensor(1.0), -128, 127).shape == shape


def test_quantize_does_not_change_its_input():
    x = torch.randn(100)
    before = x.clone()
    arithmetic.quantize(x, torch.tensor(0.1), -128, 127)
    assert torch.equal(x, before)


def test_dequantize_does_not_change_its_input():
    codes = torch.arange(-128.0, 128.0)
    arithmetic.dequantize(codes, torch.tensor(0.1))
    assert torch.equal(codes, torch.arange(-128.0, 128.0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32], ids=str)
def test_dequantize_multiplies_by_the_scale_in_float32(dtype):
    codes, scale = torch.arange(-128, 128), np.float32(0.0123)
    values = arithmetic.dequantize(codes.to(dtype), torch.tensor(scale))
    assert np.array_equal(values.numpy(), codes.numpy().astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3, 5, 5), None), ((4, 3, 5, 5), 0), ((4, 3, 5, 5), 1), ((6, 7), 1)], ids=str
)
@pytest.mark.parametrize("container", ["int8", "uint8"])
def test_codes_and_values_are_those_of_onnxruntime(container, shape, axis):
    low, high = GRIDS[container]
    x = torch.randn(shape) * 3
    amax = arithmetic.reduce_amax(x, axis) * 0.8
    scale = arithmetic.scale_from_amax(amax, high)
    onnx_codes, onnx_values = onnx_codes_and_values(
        x.numpy(), scale.numpy().reshape(-1 if axis is not None else ()), container, axis or 0
    )
    codes = arithmetic.quantize(x, scale, low, high)
    assert np.array_equal(codes.numpy(), onnx_codes.astype(np.float32))
    assert np.array_equal(arithmetic.dequantize(codes, scale).numpy(), onnx_values)


@pytest.mark.parametrize("container", ["int8", "uint8"])
def test_ties_and_infinities_are_those_of_onnxruntime(container):
    low, high = GRIDS[container]
    scale = np.float32(0.037)
    x = (np.arange(2 * low - 2, 2 * high + 3) / np.float32(2)).astype(np.float32) * scale
    x = np.concatenate([x, np.array([-np.inf, np.inf, -3e38, 3e38, -0.0], np.float32)])
    onnx_codes, _ = onnx_codes_and_values(x, scale, container, 0)
    codes = arithmetic.quantize(torch.from_numpy(x), torch.tensor(scale), low, high)
    assert np.array_equal(codes.numpy(), onnx_codes.astype(np.float32))


@grids
@given(scale=scales, steps=steps)
def test_a_value_inside_the_range_moves_by_half_a_step_at_most(low, high, scale, steps):
    x = np.clip(steps, low, high) * np.float32(scale)
    values = arithmetic.dequantize(
        arithmetic.quantize(torch.from_numpy(x), torch.tensor(scale), low, high), torch.tensor(scale)
    )
    distance = np.abs(values.numpy().astype(np.float64) - x) / scale
    # The quotient and the product are each rounded once, relative to the code.
    assert (distance <= 0.5 + 2 * np.abs(x / scale) * 2.0**-24).all()


@grids
@given(scale=scales, steps=steps)
def test_quantizing_a_dequantized_value_gives_the_same_code(low, high, scale, steps):
    scale = torch.tensor(scale)
    codes = arithmetic.quantize(torch.from_numpy(steps) * scale, scale, low, high)
    again = arithmetic.quantize(arithmetic.dequantize(codes, scale), scale, low, high)
    assert torch.equal(again, codes)


@grids
@given(scale=scales, steps=steps)
def test_codes_are_monotone(low, high, scale, steps):
    x = torch.from_numpy(np.sort(steps)) * scale
    assert (arithmetic.quantize(x, torch.tensor(scale), low, high).diff() >= 0).all()


@given(scale=scales, steps=steps)
def test_a_narrow_grid_is_symmetric(scale, steps):
    x, scale = torch.from_numpy(steps) * scale, torch.tensor(scale)
    assert torch.equal(arithmetic.quantize(-x, scale, -127, 127), -arithmetic.quantize(x, scale, -127, 127))


@given(amax=st.floats(2.0**-23, 2.0**100, width=32), num_bits=st.integers(2, 16), unsigned=st.booleans())
def test_amax_itself_becomes_the_highest_code(amax, num_bits, unsigned):
    low, high = arithmetic.integer_bounds(num_bits, unsigned)
    amax = torch.tensor(amax)
    assert arithmetic.quantize(amax, arithmetic.scale_from_amax(amax, high), low, high) == high


@pytest.mark.parametrize(
    ("x", "scale", "value"),
    [
        (1.8, 1.0, 1.75),
        (-1.8, 1.0, -1.75),
        (447.0, 1.0, 448.0),
        (1e6, 1.0, 448.0),
        (-torch.inf, 1.0, -448.0),
        (1e6, 0.5, 224.0),
        (2.0**-9, 1.0, 2.0**-9),
        (2.0**-11, 1.0, 0.0),
        (0.0, 1.0, 0.0),
    ],
)
def test_e4m3(x, scale, value):
    assert arithmetic.quantize_float(torch.tensor(x), torch.tensor(scale), (4, 3)).item() == value


def test_e4m3_keeps_nan():
    assert arithmetic.quantize_float(torch.tensor(torch.nan), torch.tensor(1.0), (4, 3)).isnan()


@pytest.mark.parametrize(
    ("axis", "ndim", "axes"),
    [
        (None, 4, ()),
        (0, 1, (0,)),
        (-1, 4, (3,)),
        (-4, 4, (0,)),
        ((2, 0), 3, (0, 2)),
        ((-1, 0), 4, (0, 3)),
        ([1], 2, (1,)),
        ((), 2, ()),
    ],
    ids=str,
)
def test_kept_axes(axis, ndim, axes):
    assert arithmetic.kept_axes(axis, ndim) == axes


@pytest.mark.parametrize(
    ("axis", "ndim", "message"),
    [
        (4, 4, "axis: expected -4 to 3 for a tensor of 4 dimensions, got 4"),
        (-5, 4, "axis: expected -4 to 3 for a tensor of 4 dimensions, got -5"),
        ((0, 2), 2, "axis: expected -2 to 1 for a tensor of 2 dimensions, got 2"),
        ((0, -2), 2, r"axis: expected different axes, got \(0, -2\) for a tensor of 2 dimensions"),
    ],
    ids=str,
)
def test_an_axis_that_does_not_fit_says_expected_and_got(axis, ndim, message):
    with pytest.raises(InvalidValueError, match=message):
        arithmetic.kept_axes(axis, ndim)


KEPT = [(None, ()), (0, (4, 1, 1)), (1, (1, 5, 1)), (-1, (1, 1, 6)), ((0, -1), (4, 1, 6)), ((0, 1, 2), (4, 5, 6))]


@pytest.mark.parametrize(("axis", "shape"), KEPT, ids=str)
def test_kept_shape(axis, shape):
    assert arithmetic.kept_shape((4, 5, 6), axis) == shape


def test_kept_shape_of_one_channel_keeps_its_dimensions():
    assert arithmetic.kept_shape((1, 3, 5, 5), 0) == (1, 1, 1, 1)


@pytest.mark.parametrize(("axis", "shape"), KEPT, ids=str)
def test_reduce_amax_is_the_largest_magnitude(axis, shape):
    x = torch.randn(4, 5, 6)
    keep = () if axis is None else tuple(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    expected = np.abs(x.numpy()).max(axis=tuple({0, 1, 2} - set(keep)), keepdims=True)
    assert np.array_equal(arithmetic.reduce_amax(x, axis).numpy(), expected.reshape(shape))


@pytest.mark.parametrize("axis", [None, 0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_reduce_amax_keeps_the_dtype(dtype, axis):
    amax = arithmetic.reduce_amax(torch.tensor([[-3.0, 1.0]], dtype=dtype), axis)
    assert (amax.item(), amax.dtype) == (3.0, dtype)


@pytest.mark.parametrize("axis", [None, 0, (0, 1)], ids=str)
def test_reduce_amax_has_no_gradient(axis):
    assert not arithmetic.reduce_amax(torch.ones(2, 2, requires_grad=True), axis).requires_grad


def test_nan_anywhere_is_a_nan_range():
    assert arithmetic.reduce_amax(torch.tensor([1.0, torch.nan, 9.0])).isnan()


def test_nan_in_one_channel_leaves_the_others_alone():
    amax = arithmetic.reduce_amax(torch.tensor([[1.0, torch.nan], [2.0, -3.0]]), 0)
    assert amax[0].isnan()
    assert amax[1] == 3.0


@pytest.mark.parametrize(("shape", "axis", "kept"), [((0,), None, ()), ((3, 0), 0, (3, 1)), ((0, 2), 0, (0, 1))])
def test_the_range_of_an_empty_tensor_is_zero(shape, axis, kept):
    amax = arithmetic.reduce_amax(torch.empty(shape), axis)
    assert amax.shape == kept
    assert not amax.any()


def test_changing_the_range_does_not_change_the_data():
    x = torch.ones(2, 2)
    arithmetic.reduce_amax(x, (0, 1)).zero_()
    assert x.sum() == 4


@pytest.mark.parametrize(
    "amax",
    [1.5, 2, np.float32(1.0), [1.0, 2.0], ((1.0,), (2.0,)), np.ones(2), np.arange(3.0)[::-1], torch.ones(2), 0.0],
    ids=lambda value: repr(value)[:30],
)
def test_check_amax_takes_numbers_sequences_arrays_and_tensors(amax):
    assert arithmetic.check_amax(amax).tolist() == np.asarray(amax).tolist()


def test_check_amax_takes_a_read_only_array():
    array = np.ones(2)
    array.setflags(write=False)
    assert arithmetic.check_amax(array).tolist() == [1.0, 1.0]


def test_check_amax_detaches():
    assert not arithmetic.check_amax(torch.ones(1, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "amax",
    [-1.0, torch.nan, torch.inf, [1.0, -1.0], torch.tensor([1.0, torch.nan]), np.array(1e300), [], True, 1j],
    ids=repr,
)
def test_check_amax_refuses_a_value_that_is_no_range(amax):
    with pytest.raises(InvalidValueError, match=r"amax: expected .*, got "):
        arithmetic.check_amax(amax)


@pytest.mark.parametrize("amax", ["1", None, object(), [[1.0], [1.0, 2.0]]], ids=["str", "None", "object", "ragged"])
def test_check_amax_refuses_other_types(amax):
    with pytest.raises(InvalidTypeError, match="amax: expected a number, sequence, array or tensor, got"):
        arithmetic.check_amax(amax)
