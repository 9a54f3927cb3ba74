"""Branches and loops: their bodies have types of their own."""

import numpy as np
import onnx_ir as ir
import pytest

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

BRANCHES = """
agraph (bool c, float[2] x) => (float[2] y) <float two = {2}, float k = {3}, float s = {0.1}, int8 z = {0}>
{ a = Relu(x)
  b = If (c) <
    then_branch = onthen () => (float[2] t) { t = Pow(a, two) },
    else_branch = onelse () => (float[2] e) <float m = {0.5}>
    { q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) f = Mul(d, k) e = Mul(f, m) }>
  y = Neg(b) }
"""


LOOP = """
agraph (float[2] x, int64 n) => (float[2] y) <float k = {0.5}, bool go = {1}>
{ r = Loop (n, go, x) <body = step (int64 i, bool c, float[2] h) => (bool o, float[2] g)
    { o = Identity(c) p = Exp(h) g = Mul(p, k) }>
  y = Neg(r) }
"""


@pytest.mark.parametrize("condition", [True, False])
def test_branches(parse, run, half, casts_beside_pairs, condition):
    model, _ = half(BRANCHES)
    feeds = {"c": np.array(condition), "x": np.float16([0.5, 3.0])}
    expected = run(parse(BRANCHES), **{**feeds, "x": feeds["x"].astype(np.float32)})[0]
    np.testing.assert_allclose(run(model, **feeds)[0], expected, rtol=2**-8)
    assert casts_beside_pairs(model) == []


@pytest.mark.parametrize(("first", "dtype"), [("x", FLOAT16), ("e", FLOAT)], ids=["float16", "float32"])
def test_a_loop(parse, run, half, types, first, dtype):
    text = LOOP.replace("{ r", "{ e = Exp(x) r").replace("go, x)", f"go, {first})")
    model, _ = half(text)
    x = np.float16([0.1, -1.0])
    (got,), (expected,) = (run(m, x=x.astype(c), n=np.array(2)) for m, c in ((model, "e"), (parse(text), "f")))
    np.testing.assert_allclose(got, expected, rtol=2**-8)
    assert types(model)["r"] == dtype
