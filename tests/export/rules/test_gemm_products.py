"""A Gemm of float data, or of data that each call quantizes, becomes a product and a sum."""

import numpy as np
import pytest

from fakequant.export.rules.gemm_products import GemmProducts

WEIGHTS = """
<int8[2, 3] w = {1, -2, 3, 4, -127, 6}, float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}, float[2] b = {1.0, -1.0},
 float xs = {0.1}, uint8 xz = {7}>
"""
FLOAT = f"""
agraph (float[2, 3] x) => (float[2, 2] y) {WEIGHTS}
{{ v = DequantizeLinear<axis = 0>(w, s, z) y = Gemm<transB = 1>(x, v, b) }}
"""
DYNAMIC = FLOAT.replace("{ v =", "{ q, cs, cz = DynamicQuantizeLinear(x) d = DequantizeLinear(q, cs, cz) v =").replace(
    "(x, v", "(d, v"
)
STATIC = FLOAT.replace("{ v =", "{ q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz) v =").replace(
    "(x, v", "(d, v"
)
X = np.array([[0.3, -1.7, 2.9], [0.11, 0.52, -0.4]], np.float32)


@pytest.mark.parametrize(("text", "adds"), [(FLOAT, "Sum"), (DYNAMIC, "Add")], ids=["float", "dynamic"])
def test_it_becomes_a_product_and_a_sum(parse, ops, text, adds):
    model = parse(text)
    assert GemmProducts()(model).modified
    assert ops(model)[-2:] == ["MatMul", adds]


@pytest.mark.parametrize("text", [FLOAT, DYNAMIC, FLOAT.replace(", b)", ")")], ids=["float", "dynamic", "no-bias"])
def test_the_graph_computes_the_same(parse, run, text):
    model = parse(text)
    (before,) = run(model, x=X)
    GemmProducts()(model)
    np.testing.assert_allclose(run(model, x=X)[0], before, rtol=1e-6)


def test_blocks_are_transposed_with_their_scales(parse, run):
    text = FLOAT.replace(
        "float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}", "float[2, 2] s = {1, 2, 3, 4}, int8[2, 2] z = {0, 0, 0, 0}"
    )
    model = parse(text.replace("<axis = 0>", "<axis = 1, block_size = 2>"), opset=21)
    (before,) = run(model, x=X)
    GemmProducts()(model)
    np.testing.assert_allclose(run(model, x=X)[0], before, rtol=1e-6)
    assert model.graph[0].attributes.get_int("axis") == 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(STATIC, id="fixed-scale"),
        pytest.param(FLOAT.replace("transB", "alpha = 2.0, transB"), id="alpha"),
        pytest.param(FLOAT.replace("y = Gemm", "t = Neg(v) y = Gemm"), id="shared-weight"),
    ],
)
def test_what_stays(parse, text):
    assert not GemmProducts()(parse(text)).modified
