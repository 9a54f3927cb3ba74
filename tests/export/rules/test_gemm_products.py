"""A Gemm of float data, or of data that each call quantizes, becomes a product and a sum."""

import numpy as np
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export.rules.gemm_products import GemmProducts

WEIGHTS = """
<int8[2, 3] w = {100, -2, 3, 4, -127, 6}, float[2] s = {0.5, 0.02}, int8[2] z = {0, 0}, float[2] b = {1.0, -1.0},
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
TWICE = DYNAMIC.replace("float[2, 2] y)", "float[2, 2] y, float[2, 2] n)").replace(
    "y = Gemm", "m = Max(d) n = Gemm<transB = 1>(m, v, b) y = Gemm"
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


def test_a_weight_of_several_calls_is_transposed_once(parse, run, ops):
    model = parse(TWICE)
    before = run(model, x=X)
    GemmProducts()(model)
    assert ops(model)[-4:] == ["MatMul", "Add", "MatMul", "Add"]
    for found, expected in zip(run(model, x=X), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


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
        pytest.param(FLOAT.replace("y = Gemm", "t = Neg(v) y = Gemm"), id="other-reader"),
        pytest.param(
            FLOAT.replace("2] y)", "2] y, float[1, 3] n)")
            .replace("{ v", "{ e = Unsqueeze(b, u) v")
            .replace("y = Gemm", "n = Gemm(e, v) y = Gemm")
            .replace("float xs", "int64[1] u = {0}, float xs"),
            id="two-layouts",
        ),
        pytest.param(FLOAT.replace("2] y)", "2] y, float[2, 3] v)"), id="output"),
        pytest.param(TWICE.replace("<transB = 1>(m, v", "<transB = 1, alpha = 2.0>(m, v"), id="alpha-of-one"),
    ],
)
def test_what_stays(parse, text):
    assert not GemmProducts()(parse(text)).modified


@pytest.mark.parametrize(
    ("weight", "data"),
    [
        (fq.QuantDescriptor(8, axis=0, narrow_range=True), fq.QuantDescriptor(8)),
        (fq.QuantDescriptor(2, axis=0), fq.QuantDescriptor(2)),
        (fq.QuantDescriptor(1, scheme="xnor", axis=0), fq.QuantDescriptor(1, scheme="bnn")),
    ],
    ids=["int8", "2-bit", "xnor"],
)
def test_a_bias_is_not_rounded_away_and_the_product_stays_integer(tmp_path, optimized_ops, weight, data):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16)).eval(), torch.rand(8, 32)
    fq.quantize(model, fq.Recipe((fq.Rule(type="Linear", input=data, weight=weight),)))
    if weight.scheme == "uniform":
        fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime")
    found = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert found.simulated.sqnr_db > 90
    assert found.optimized.sqnr_db > 90
    ops = optimized_ops(tmp_path / "m.onnx")
    assert ops["QGemm"] + ops["MatMulIntegerToFloat"] == 1
