import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fakequant.arithmetic import affine_parameters, dequantize_affine, quantize_affine, reduce_range

finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
arrays = npst.arrays(np.float32, npst.array_shapes(max_dims=2, max_side=20), elements=finite)
grids = pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (0, 15), (-8, 7)])


def dynamic_quantize_linear() -> onnxruntime.InferenceSession:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 13]>
        g (float[n] x) => (uint8[n] codes, float scale, uint8 zero) { codes, scale, zero = DynamicQuantizeLinear(x) }
    """)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def parameters(x: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    return affine_parameters(*reduce_range(x), low, high)


@given(x=arrays)
def test_codes_0_to_255_are_those_of_dynamic_quantize_linear(x):
    x = x.reshape(-1)
    if max(x.max(), 0) - min(x.min(), 0) <= 2.0**-24:
        return  # ONNX Runtime has the scale 1 for zeros, we DEAD_SCALE; the values are 0 either way
    codes, scale, zero = SESSION.run(None, {"x": x})
    our_scale, our_zero = parameters(torch.from_numpy(x), 0, 255)
    assert (our_scale.numpy(), our_zero.numpy()) == (scale, zero)
    np.testing.assert_array_equal(quantize_affine(torch.from_numpy(x), our_scale, our_zero, 0, 255), codes)


SESSION = dynamic_quantize_linear()


@grids
@given(x=arrays)
def test_a_value_in_the_range_is_at_most_half_a_step_from_its_own_except_at_the_rounded_ends(x, low, high):
    x = torch.from_numpy(x)
    scale, zero_point = parameters(x, low, high)
    back = dequantize_affine(quantize_affine(x, scale, zero_point, low, high), scale, zero_point)
    # The zero point is rounded, which shifts the range by up to half a step; then the far end is clamped.
    assert ((back - x).abs() <= scale * 1.001).all()


@grids
@given(amin=st.floats(-1e5, 0, width=32), amax=st.floats(0, 1e5, width=32))
def test_zero_is_a_value_of_the_grid_and_the_zero_point_a_code(amin, amax, low, high):
    scale, zero_point = affine_parameters(torch.tensor(amin), torch.tensor(amax), low, high)
    assert scale > 0
    assert zero_point == zero_point.round()
    assert low <= zero_point <= high
    zero = quantize_affine(torch.zeros(()), scale, zero_point, low, high)
    assert dequantize_affine(zero, scale, zero_point) == 0


@pytest.mark.parametrize(
    ("amin", "amax", "scale", "zero_point"),
    [(-1.0, 254.0, 1.0, 1.0), (0.0, 25.5, 0.1, 0.0), (-12.75, 12.75, 0.1, 128.0), (-25.5, 0.0, 0.1, 255.0)],
)
def test_hand_computed_parameters(amin, amax, scale, zero_point):
    found = affine_parameters(torch.tensor(amin), torch.tensor(amax), 0, 255)
    assert float(found[0]) == pytest.approx(scale)
    assert float(found[1]) == zero_point  # -12.75 / 0.1 = -127.5, whose even neighbour is 128


def test_a_dead_range_has_a_positive_scale():
    scale, _ = affine_parameters(torch.tensor(0.0), torch.tensor(0.0), 0, 255)
    assert scale == 2.0**-14


def test_ranges_are_per_channel():
    x = torch.tensor([[-1.0, 3.0], [0.5, 2.0]])
    scale, zero_point = affine_parameters(*reduce_range(x, 0), 0, 15)
    torch.testing.assert_close(scale, torch.tensor([[4 / 15], [2 / 15]]))
    assert zero_point.tolist() == [[4.0], [0.0]]
