import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakequant import arithmetic
from fakequant.arithmetic import (
    as_blocks,
    block_shape,
    codes_on,
    from_blocks,
    over_blocks,
    per_block,
    range_of,
    values_on,
)
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError
from fakequant.fake_quantize import fake_quantize_on

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@given(shape=shapes, size=st.integers(2, 16), data=st.data())
def test_blocks_come_back(shape, size, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape)
    assert torch.equal(from_blocks(as_blocks(x, size, axis), shape, axis), x)


@given(shape=shapes, size=st.integers(2, 16), data=st.data())
def test_scales_have_one_element_a_block(shape, size, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    scales = torch.randn(block_shape(shape, size, axis))
    blocks = as_blocks(torch.randn(shape), size, axis)
    assert over_blocks(scales, axis).expand(blocks.shape).shape == blocks.shape
    assert torch.equal(per_block(over_blocks(scales, axis), axis), scales)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(InvalidValueError, match="block_axis: expected -2 to 1 for a tensor of 2 dimensions, got 2"):
        as_blocks(torch.zeros(2, 4), 2, 2)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("affine", [False, True])
def test_codes_scales_and_zero_points_are_those_of_onnx_blocked_quantization(axis, affine):
    grid = QuantDescriptor(8, affine=affine, unsigned=affine, block_size=16, block_axis=axis)
    x = torch.randn(64, 32)
    codes = codes_on(grid, x, *range_of(grid, x))
    stored = np.uint8 if affine else np.int8
    zeros = torch.zeros_like(codes.scale) if codes.zero_point is None else codes.zero_point
    found = dequantized(codes.codes.numpy().astype(stored), codes.scale.numpy(), zeros.numpy().astype(stored), axis)
    np.testing.assert_array_equal(values_on(grid, codes), found)
    assert (torch.from_numpy(found) - x).abs().max() <= codes.scale.max()


def dequantized(codes, scale, zero_point, axis):
    """Return what ONNX Runtime makes of blocked codes."""
    kind = "uint8" if codes.dtype == np.uint8 else "int8"
    n, m = scale.shape
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g ({kind}[64, 32] codes, float[{n}, {m}] scale, {kind}[{n}, {m}] zero) => (float[64, 32] y)
        {{ y = DequantizeLinear<axis = {axis}, block_size = 16>(codes, scale, zero) }}
    """)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"codes": codes, "scale": scale, "zero": zero_point})[0]


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), size=st.sampled_from([2, 16, 32]))
def test_each_block_uses_its_own_range_whole(rows, columns, size):
    grid = QuantDescriptor(4, block_size=size)
    x = torch.randn(rows, columns)
    codes = codes_on(grid, x, *range_of(grid, x)).codes
    largest = as_blocks(codes, size).abs().amax(-1)
    assert ((largest == 7) | (largest == 0)).all()


def test_the_last_block_may_be_smaller():
    grid = QuantDescriptor(8, block_size=4)
    amax, amin = range_of(grid, torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0]]))
    assert amax.tolist() == [[4.0, 5.0]]
    assert amin is None


@pytest.mark.parametrize("shape", [(0, 70), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "grid",
    [QuantDescriptor(4, block_size=32), QuantDescriptor((2, 1), block_size=16, scale_format="e4m3")],
    ids=str,
)
def test_an_empty_tensor_stays_empty(grid, shape):
    x = torch.empty(shape, requires_grad=True)
    values = fake_quantize_on(grid, x, *range_of(grid, x))
    values.sum().backward()
    assert values.shape == x.grad.shape == shape


def test_nvfp4_has_one_scale_of_the_tensor_and_e4m3_scales_of_blocks():
    grid = QuantDescriptor((2, 1), block_size=16, scale_format="e4m3")
    scale, _ = arithmetic.grid_parameters(grid, torch.tensor([[6.0, 2688.0]]))
    assert scale.tolist() == [[1.0, 448.0]]


def test_mxint8_is_a_fixed_point_number_with_6_bits_behind_the_point():
    grid = QuantDescriptor(8, block_size=32, scale_format="e8m0")
    scale, _ = arithmetic.grid_parameters(grid, torch.tensor([1.5, 2.0, 100.0]))
    assert scale.tolist() == [1 / 64, 2 / 64, 64 / 64]
