"""Markers of dynamic and blocked grids become graphs that compute what torch does."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

import fakequant as fq
from fakequant.export.graph import constant_of
from fakequant.export.rules.expand_quantizers import ExpandQuantizers

D = fq.QuantDescriptor
AFFINE = D(8, unsigned=True, affine=True, dynamic=True)
TOKENS = D(8, axis="tokens", dynamic=True)
ACTIVATION = 'agraph (float[N, 3] x) => (float[N, 3] y) { y = fakequant.Quantizer<name = "q">(x) }'
WEIGHT = """
agraph (float[1, 5] x) => (float[1, 2] y)
<float[5, 2] w = {-9.0, 0.6, 0.25, 1.6, 3.0, -0.2, 0.7, 0.8, -0.9, 5.0}>
{ d = fakequant.Quantizer<name = "q">(w) y = MatMul(x, d) }
"""
W = np.array([-9.0, 0.6, 0.25, 1.6, 3.0, -0.2, 0.7, 0.8, -0.9, 5.0], np.float32).reshape(5, 2)
X = np.array([[-3.0, 0.2, 0.5], [0.37, -0.11, 9.0], [0.0, 0.0, 0.0]], dtype=np.float32)


def expand(parse, text: str, grid: D, opset: int = 19) -> ir.Model:
    model = parse(text, opset=opset)
    ExpandQuantizers({"q": fq.TensorQuantizer(grid)})(model)
    return model


def affine(x: np.ndarray) -> np.ndarray:
    """Quantize as the specification of DynamicQuantizeLinear says."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point).astype(np.float32) * scale


def symmetric(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Quantize to 8 bits with the range of everything, or of each vector along an axis; zeros stay zero."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scale == 0, np.float32(1), scale)) * scale


def test_an_affine_grid_is_dynamic_quantize_linear(parse, ops):
    assert ops(expand(parse, ACTIVATION, AFFINE)) == ["DynamicQuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("x", [X, X + 4, -X - 10], ids=["both-signs", "positive-end", "negative"])
def test_an_affine_grid_computes_what_the_specification_says(parse, run, x):
    np.testing.assert_array_equal(run(expand(parse, ACTIVATION, AFFINE), x=x)[0], affine(x))


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(("grid", "axis"), [(TOKENS, 1), (TOKENS.replace(axis=None), None)], ids=["tokens", "tensor"])
def test_a_symmetric_grid_computes_its_range(parse, run, grid, axis, opset):
    np.testing.assert_allclose(run(expand(parse, ACTIVATION, grid, opset), x=X)[0], symmetric(X, axis), rtol=1e-6)


@pytest.mark.parametrize(
    "grid", [AFFINE, TOKENS, D(4, axis="tokens", dynamic=True), D(8, dynamic=True, scale_amax=0.7)]
)
def test_the_graph_computes_what_torch_does(parse, run, grid):
    x = np.concatenate([X, np.array([[1e-9, 0.0, -1e-9]], np.float32)])  # a dead vector
    expected = fq.TensorQuantizer(grid)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(expand(parse, ACTIVATION, grid), x=x)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, ir.DataType.INT4), (3, ir.DataType.INT4), (8, ir.DataType.INT8)], ids=["4", "3", "8"]
)
def test_blocks_store_codes_and_a_scale_each(parse, run, axis, bits, dtype):
    grid = D(bits, block_size=2, block_axis=axis, dynamic=True)
    model = expand(parse, WEIGHT, grid, opset=21)
    stored, scale = model.graph[0].inputs[:2]
    assert (stored.dtype, tuple(scale.shape)) == (dtype, (3, 2) if axis == 0 else (5, 1))
    eye = np.eye(5, dtype=np.float32)
    values = np.concatenate([run(model, x=row[None])[0] for row in eye])
    scales = np.repeat(constant_of(scale), 2, axis)[:5, :2]
    high = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(values, np.clip(np.rint(W / scales), -high - 1, high) * scales, rtol=1e-6)


def test_an_affine_weight_has_its_zero_points(parse, run):
    model = expand(parse, WEIGHT, D(8, unsigned=True, affine=True, axis=1, dynamic=True))
    scale = (np.maximum(W.max(0), 0) - np.minimum(W.min(0), 0)) / np.float32(255)
    np.testing.assert_array_equal(constant_of(model.graph[0].inputs[2]), np.rint(-np.minimum(W.min(0), 0) / scale))
    row = np.array([[0, 0, 0, 0, 1]], np.float32)
    assert np.abs(run(model, x=row)[0] - W[4]).max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize(
    ("bits", "dtype", "numpy"),
    [
        ((4, 3), ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        ((5, 2), ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    ],
    ids=["e4m3", "e5m2"],
)
def test_a_weight_in_fp8_is_stored(parse, bits, dtype, numpy):
    model = expand(parse, WEIGHT, D(bits, axis=1, amax=[[9.0, 5.0]]))
    stored, scale = model.graph[0].inputs[:2]
    assert (stored.dtype, model.graph[0].op_type) == (dtype, "DequantizeLinear")
    expected = (W / constant_of(scale)).astype(numpy)
    np.testing.assert_array_equal(constant_of(stored).astype(np.float32), expected.astype(np.float32))


def test_a_static_affine_grid_has_its_zero_point(parse, run):
    quantizer = fq.TensorQuantizer(D(8, unsigned=True, affine=True))
    quantizer.set_range(torch.tensor(4.0), torch.tensor(-1.0))
    model = parse(ACTIVATION)
    ExpandQuantizers({"q": quantizer})(model)
    assert constant_of(model.graph[0].inputs[2]) == 51
    np.testing.assert_array_equal(run(model, x=X)[0], quantizer(torch.from_numpy(X)).numpy())


def test_a_narrow_affine_grid_is_clamped(parse, run, ops):
    quantizer = fq.TensorQuantizer(D(4, unsigned=True, affine=True))
    quantizer.set_range(torch.tensor(4.0), torch.tensor(-1.0))
    model = parse(ACTIVATION)
    ExpandQuantizers({"q": quantizer})(model)
    assert ops(model)[:2] == ["Max", "Min"]
    np.testing.assert_array_equal(run(model, x=X)[0], quantizer(torch.from_numpy(X)).numpy())
