import numpy as np
import pytest

from fakequant.export.graph import constant_of
from fakequant.export.rules.integer_weights import IntegerWeights
from fakequant.onnx_ops import BOUNDS_KEY

TEXT = """
agraph (float[1, 2] x) => (float[1, 2] y)
<float[2, 2] w = {-9.0, 0.6, 0.25, 1.6}, float[2] s = {0.01, 0.5}, int8[2] z = {0, 0}>
{
    q = QuantizeLinear<axis = 0>(w, s, z)
    d = DequantizeLinear<axis = 0>(q, s, z)
    y = MatMul(x, d)
}
"""
NARROW = {"q": {BOUNDS_KEY: "-127 127"}}


def test_the_codes_are_stored(parse, ops):
    model = parse(TEXT, NARROW)
    assert IntegerWeights()(model).modified
    assert ops(model) == ["DequantizeLinear", "MatMul"]
    codes = constant_of(model.graph[0].inputs[0])
    assert codes.dtype == np.int8
    # 0.25 / 0.5 is a tie: to the even code.
    assert codes.tolist() == [[-127, 60], [0, 3]]


def test_the_graph_computes_the_same(parse, run):
    x = np.array([[1.0, 2.0]], dtype=np.float32)
    model = parse(TEXT, {"q": {BOUNDS_KEY: "-128 127"}})
    (before,) = run(model, x=x)
    IntegerWeights()(model)
    np.testing.assert_array_equal(run(model, x=x)[0], before)


@pytest.mark.parametrize(
    "clamp",
    ["c = Clip(w, low, high)", "l = Max(w, low) c = Min(l, high)"],
    ids=["clip", "max-min"],
)
def test_the_clamp_of_a_narrow_grid_is_looked_through(parse, clamp):
    text = TEXT.replace("float[2] s =", "float low = {-100.0}, float high = {100.0}, float[2] s =")
    model = parse(
        text.replace("q = QuantizeLinear<axis = 0>(w", f"{clamp} q = QuantizeLinear<axis = 0>(c"),
        {"q": {BOUNDS_KEY: "-8 7"}},
    )
    IntegerWeights()(model)
    (dequantize,) = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert constant_of(dequantize.inputs[0]).tolist() == [[-8, 7], [0, 3]]


def test_an_activation_stays(parse):
    model = parse(
        """
        agraph (float[1, 2] x) => (float[1, 2] y)
        <float s = {0.5}, int8 z = {0}>
        { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }
        """,
        {"q": {BOUNDS_KEY: "-128 127"}},
    )
    assert not IntegerWeights()(model).modified


def test_a_q_without_bounds_stays(parse):
    assert not IntegerWeights()(parse(TEXT)).modified
