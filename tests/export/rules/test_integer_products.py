"""Products of tensors that each call quantizes anew become products of integers."""

import numpy as np
import pytest

from fakequant.export.graph import MODULE_KEY, QUANTIZER_KEY
from fakequant.export.rules.integer_products import IntegerProducts

PRODUCT = """
agraph (float[2, 3] x) => (float[2, 2] y)
<int8[3, 2] w = {1, -2, 3, 4, -127, 6}, float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}, float[2] b = {1.0, -1.0}>
{
    q, xs, xz = DynamicQuantizeLinear(x)
    d = DequantizeLinear(q, xs, xz)
    v = DequantizeLinear<axis = 1>(w, s, z)
    p = MatMul(d, v)
    y = Add(p, b)
}
"""
PER_TENSOR = PRODUCT.replace("float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}", "float s = {0.5}, int8 z = {0}")
X = np.array([[0.3, -1.7, 2.9], [0.11, 0.52, -0.4]], np.float32)

CONVOLUTION = """
agraph (float[1, 2, 4] x) => (float[1, 3, 4] y)
<int8[3, 2, 3] w = {1, -2, 3, 4, -127, 6, 7, 8, -9, 10, 11, 12, -128, 14, 15, 16, 17, 18},
 float[3] s = {0.5, 0.02, 1.5}, int8[3] z = {0, 0, 0}, float[3] b = {1.0, -1.0, 0.5}>
{
    q, xs, xz = DynamicQuantizeLinear(x)
    d = DequantizeLinear(q, xs, xz)
    v = DequantizeLinear<axis = 0>(w, s, z)
    y = Conv<pads = [1, 1], kernel_shape = [3]>(d, v, b)
}
"""
SIGNAL = np.linspace(-1.3, 2.7, 8, dtype=np.float32).reshape(1, 2, 4)

ROWS = """
agraph (float[2, 3] x, float[2, 1] r) => (float[2, 2] y)
<int8[3, 2] w = {1, -2, 3, 4, -127, 6}, float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}, float one = {1.0}, int8 o = {0}>
{
    n = Div(x, r)
    q = QuantizeLinear(n, one, o)
    d = DequantizeLinear(q, one, o)
    a = Mul(d, r)
    v = DequantizeLinear<axis = 1>(w, s, z)
    y = MatMul(a, v)
}
"""


@pytest.mark.parametrize("text", [PRODUCT, PER_TENSOR], ids=["columns", "tensor"])
def test_a_product_is_one_of_integers(parse, ops, text):
    model = parse(text)
    assert IntegerProducts()(model).modified
    assert [op for op in ops(model) if op != "DequantizeLinear"] == [
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "Cast",
        "Mul",
        "Mul",
        "Add",
    ]


@pytest.mark.parametrize("text", [PRODUCT, PER_TENSOR], ids=["columns", "tensor"])
def test_a_product_computes_the_same(parse, run, text):
    model = parse(text)
    (before,) = run(model, x=X)
    IntegerProducts()(model)
    np.testing.assert_allclose(run(model, x=X)[0], before, rtol=1e-6)


def test_a_convolution_is_one_of_unsigned_integers(parse, ops, run):
    model = parse(CONVOLUTION)
    (before,) = run(model, x=SIGNAL)
    IntegerProducts()(model)
    assert "ConvInteger" in ops(model)
    np.testing.assert_allclose(run(model, x=SIGNAL)[0], before, rtol=1e-5, atol=1e-6)


def test_the_weight_of_a_convolution_is_uint8(parse):
    model = parse(CONVOLUTION)
    IntegerProducts()(model)
    (product,) = [node for node in model.graph if node.op_type == "ConvInteger"]
    assert product.inputs[1].const_value.numpy().dtype == np.uint8


def test_the_scales_of_rows_go_behind_the_product(parse, ops, run):
    model, rows = parse(ROWS), np.array([[0.02], [0.004]], np.float32)
    (before,) = run(model, x=X, r=rows)
    IntegerProducts()(model)
    assert ops(model)[-2:] == ["MatMul", "Mul"]
    np.testing.assert_allclose(run(model, x=X, r=rows)[0], before, rtol=1e-6)


def test_the_product_keeps_the_names(parse):
    model = parse(PRODUCT, {"p": {MODULE_KEY: "fc"}, "v": {QUANTIZER_KEY: "fc._weight_quantizer"}})
    IntegerProducts()(model)
    (product,) = [node for node in model.graph if node.op_type == "MatMulInteger"]
    assert product.metadata_props == {MODULE_KEY: "fc", QUANTIZER_KEY: "fc._weight_quantizer"}


def test_an_output_of_the_graph_keeps_its_name(parse, run):
    model = parse(PRODUCT.replace("p = MatMul(d, v)\n    y = Add(p, b)", "y = MatMul(d, v)"))
    IntegerProducts()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert run(model, x=X)[0].shape == (2, 2)


STAYING = {
    "zero-point": PRODUCT.replace("z = {0, 0}", "z = {0, 3}"),
    "axis-of-the-sum": PRODUCT.replace(
        "float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}", "float[3] s = {1, 2, 3}, int8[3] z = {0, 0, 0}"
    ).replace("<axis = 1>", "<axis = 0>"),
    "fixed-scale": PRODUCT.replace("q, xs, xz = DynamicQuantizeLinear(x)", "q = QuantizeLinear(x, xs, xz)").replace(
        "float[2] b", "float xs = {0.5}, uint8 xz = {3}, float[2] b"
    ),
    "computed-bias": CONVOLUTION.replace("y = Conv", "c = Neg(b) y = Conv").replace("(d, v, b)", "(d, v, c)"),
    "groups": CONVOLUTION.replace("float[1, 2, 4] x", "float[1, 6, 4] x").replace("<pads", "<group = 3, pads"),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays(parse, name):
    assert not IntegerProducts()(parse(STAYING[name])).modified
