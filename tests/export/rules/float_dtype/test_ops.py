"""What ONNX or the range of float16 wants in float32 stays so, and nothing else."""

import numpy as np
import onnx_ir as ir
import pytest

from fakequant.export.rules.float_dtype import FloatDtype

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

POSITIONS = """
agraph (int64[3] p, float[3] x) => (float[3] y) <float f = {0.7}>
{ a = Cast<to = 1>(p) b = Mul(a, f) c = Sin(b) y = Mul(x, c) }
"""


def test_positions_are_computed_in_float32(run, half):
    model, _ = half(POSITIONS)
    positions = np.array([1, 2049, 40001])
    (got,) = run(model, p=positions, x=np.ones(3, np.float16))
    np.testing.assert_allclose(got, np.sin(positions * 0.7), atol=4e-3)


def test_a_table_of_a_constant_shape_is_computed_in_float32_with_positions(half, types):
    text = """agraph (int64[N, 1, 1] p, float[N, 2, 1] x) => (float[N, 2, 1] y) <float[1, 2, 1] f = {0.7, 0.1}>
    { s = Shape(x) e = Expand(f, s) a = Cast<to = 1>(p) b = Neg(a) m = MatMul(e, b) c = Cos(m)
      y = Mul(x, c) }"""
    model, _ = half(text)
    assert [types(model)[name] for name in "eabmc"] == [FLOAT] * 5


def test_integers_are_compared_in_float32(ops, half, types):
    text = "agraph (int64[3] p) => (bool[3] y) <float n = {2049}> { a = Cast<to = 1>(p) y = Less(a, n) }"
    model, _ = half(text)
    assert ops(model) == ["Cast", "Less"]
    assert types(model)["a"] == FLOAT


def test_small_integers_become_float16_at_once(ops, half, types):
    text = "agraph (uint8[4] x) => (float[4] y) <float c = {255}> { a = Cast<to = 1>(x) y = Div(a, c) }"
    model, _ = half(text)
    assert ops(model) == ["Cast", "Div"]
    assert types(model)["a"] == FLOAT16


@pytest.mark.parametrize("op_type", ["Exp", "Log", "Reciprocal", "Softplus"])
def test_what_autocast_keeps_in_float32(half, types, op_type):
    text = f"agraph (float[4] x) => (float[4] y) {{ a = {op_type}(x) b = Add(a, x) y = Relu(b) }}"
    model, rewrite = half(text, a="layer")
    assert (types(model)["a"], types(model)["y"]) == (FLOAT, FLOAT16)
    assert rewrite.float32_layers == {"layer": f"{op_type} computes in float32, as under torch.autocast"}


def test_a_root_mean_square_does_not_overflow(run, half):
    text = """agraph (float[1, 4] x) => (float[1, 4] y) <float two = {2}, int64[1] last = {-1}, float eps = {1e-6}>
    { a = Pow(x, two) b = ReduceMean(a, last) c = Add(b, eps) d = Sqrt(c) y = Div(x, d) }"""
    model, _ = half(text)
    x = np.float16([[1000, -2000, 500, 3000]])
    expected = x.astype(float) / np.sqrt((x.astype(float) ** 2).mean())
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=2**-9)


@pytest.mark.parametrize(
    ("text", "float32"),
    [
        ("(float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] s = {1, 1, 2, 2}> { y = Resize(x, , s) }", {"s"}),
        (
            "(float[2, 4] x) => (float[2, 4] y, float[2, 1] m) <float[4] g = {1, 2, 3, 4}> "
            "{ y, m = LayerNormalization(x, g) }",
            {"m.float32"},
        ),
        ("(int64[1] n) => (float[N] y) { y = ConstantOfShape<value = float[1] {2.5}>(n) }", set()),
        ("(int64[1] n) => (float[N] y) { y = ConstantOfShape(n) }", set()),
        ("(float[4] x) => (float[4] y) { r = RandomUniform<shape = [4]>() y = Mul(x, r) }", set()),
        ("(int64 n, float[N] x) => (float[N] y) { w = HannWindow(n) y = Mul(x, w) }", set()),
        ("(float[4] x) => (float[4] y) { r = RandomUniformLike<dtype = 1>(x) y = Mul(x, r) }", set()),
        ("(float[4] x) => (float[4] y) <float low = {-1}, float high = {6}> { y = Clip(x, low, high) }", set()),
        ("(bool[4] c, float[4] x) => (float[4] y) <float z = {0}> { y = Where(c, x, z) }", set()),
        ("(float[4] x) => (bool[4] y) <float z = {0}> { y = Less(x, z) }", set()),
        ("(float n, float[N] x) => (float[N] y) <float a = {0}, float b = {1}> { r = Range(a, n, b) y = Mul(x, r) }",
         {"a", "b", "n.float32", "r"}),
        ("(float[4] x) => (float[2] y) <int64 i = {1}, int64[2] s = {2, 2}> "
         "{ p = SplitToSequence(x, s) y = SequenceAt(p, i) }", set()),
    ],
    ids=["resize", "layer-norm", "constant-of-shape", "zeros-of-shape", "random", "window", "random-like", "clip",
         "where", "less", "range", "sequence"],
)  # fmt: skip
def test_only_what_onnx_wants_in_float32_stays_so(half, types, text, float32):
    model, _ = half(f"agraph {text}")
    names = {name for name, dtype in types(model).items() if dtype == FLOAT}
    assert names | {name for name, value in model.graph.initializers.items() if value.dtype == FLOAT} == float32


def test_an_op_that_onnx_does_not_know_stays_float32(parse, types):
    model = parse("agraph (float[4] x) => (float[4] y) { a = Neg(x) b = Relu(a) y = Abs(b) }")
    model.graph[1].domain = "mine"
    model.opset_imports["mine"] = 1
    FloatDtype("float16")(model)
    assert types(model)["b"] == FLOAT
