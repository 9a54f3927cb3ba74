"""Codes of 4 bits are stored as INT4 where their product is of float data."""

import numpy as np
import onnx_ir as ir
import pytest

from fakequant.export.rules.four_bits import FourBits

TEXT = """
agraph (float[2, 3] x) => (float[2, 2] y)
<int8[3, 2] w = {1, -2, 3, 4, -8, 7}, float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}, float xs = {0.1}, uint8 xz = {7}>
{ v = DequantizeLinear<axis = 1>(w, s, z) y = MatMul(x, v) }
"""
QUANTIZED = TEXT.replace("{ v", "{ q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz) v").replace(
    "(x, v)", "(d, v)"
)
X = np.array([[0.3, -1.7, 2.9], [0.11, 0.52, -0.4]], np.float32)


def test_codes_and_zero_point_are_int4(parse):
    model = parse(TEXT, opset=21)
    assert FourBits()(model).modified
    assert [model.graph[0].inputs[index].dtype for index in (0, 2)] == [ir.DataType.INT4] * 2


def test_the_graph_computes_the_same(parse, run):
    model = parse(TEXT, opset=21)
    (before,) = run(model, x=X)
    FourBits()(model)
    np.testing.assert_array_equal(run(model, x=X)[0], before)


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        pytest.param(TEXT, 20, id="opset-without-int4"),
        pytest.param(TEXT.replace("-8, 7}", "-8, 8}"), 21, id="too-high"),
        pytest.param(TEXT.replace("-8, 7}", "-9, 7}"), 21, id="too-low"),
        pytest.param(QUANTIZED, 21, id="quantized-data"),
    ],
)
def test_what_stays(parse, text, opset):
    assert not FourBits()(parse(text, opset=opset)).modified
