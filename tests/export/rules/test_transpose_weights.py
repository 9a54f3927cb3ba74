import numpy as np
import pytest

from fakequant.export.graph import constant_of
from fakequant.export.rules.transpose_weights import TransposeWeights

TEXT = """
agraph (float[1, 3] x) => (float[1, 2] y)
<int8[2, 3] w = {1, 2, 3, 4, 5, 6}, float[2] s = {0.5, 2.0}, int8[2] z = {0, 0}>
{
    d = DequantizeLinear<axis = 0>(w, s, z)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(x, t)
}
"""
X = np.array([[1.0, -2.0, 3.0]], dtype=np.float32)


def test_the_stored_weight_is_transposed(parse, ops):
    model = parse(TEXT)
    assert TransposeWeights()(model).modified
    assert ops(model) == ["DequantizeLinear", "MatMul"]
    assert constant_of(model.graph[0].inputs[0]).tolist() == [[1, 4], [2, 5], [3, 6]]


def test_the_axis_moves_along(parse):
    model = parse(TEXT)
    TransposeWeights()(model)
    assert model.graph[0].attributes.get_int("axis") == 1


@pytest.mark.parametrize("perm", ["<perm = [1, 0]>", ""], ids=["perm", "default"])
def test_the_graph_computes_the_same(parse, run, perm):
    model = parse(TEXT.replace("<perm = [1, 0]>", perm))
    (before,) = run(model, x=X)
    TransposeWeights()(model)
    np.testing.assert_array_equal(run(model, x=X)[0], before)


def test_a_cyclic_permutation_moves_the_axis_right(parse, run):
    model = parse("""
    agraph (float[1, 3] x) => (float[4, 1, 2] y)
    <int8[2, 3, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24},
     float[2] s = {0.5, 2.0}, int8[2] z = {0, 0}>
    { d = DequantizeLinear<axis = 0>(w, s, z) t = Transpose<perm = [2, 1, 0]>(d) y = MatMul(x, t) }
    """)
    (before,) = run(model, x=X)
    TransposeWeights()(model)
    assert model.graph[0].attributes.get_int("axis") == 2
    np.testing.assert_array_equal(run(model, x=X)[0], before)


def test_a_weight_with_another_reader_stays(parse):
    model = parse(
        TEXT.replace("=> (float[1, 2] y)", "=> (float[1, 2] y, float[2, 3] n)").replace("y = M", "n = Neg(d) y = M")
    )
    assert not TransposeWeights()(model).modified


def test_an_activation_stays(parse):
    model = parse("""
    agraph (int8[2, 3] x) => (float[3, 2] y)
    <float s = {0.5}, int8 z = {0}>
    { d = DequantizeLinear(x, s, z) y = Transpose<perm = [1, 0]>(d) }
    """)
    assert not TransposeWeights()(model).modified


TIED = """
agraph (float[1, 3] x) => (float[1, 2] y, float[1, 2] z)
<int8[2, 3] w = {1, 2, 3, 4, 5, 6}, float[2] s = {0.5, 2.0}, int8[2] zp = {0, 0}>
{
    d = DequantizeLinear<axis = 0>(w, s, zp)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(x, t)
    u = Transpose(d)
    z = MatMul(x, u)
}
"""


def test_a_weight_that_several_layers_transpose_alike_is_stored_once(parse, run, ops):
    model = parse(TIED)
    before = run(model, x=X)
    TransposeWeights()(model)
    assert ops(model) == ["DequantizeLinear", "MatMul", "MatMul"]
    np.testing.assert_array_equal(run(model, x=X), before)


def test_a_weight_that_is_transposed_in_two_ways_stays(parse):
    text = TIED.replace("u = Transpose(d)", "u = Transpose<perm = [0, 1]>(d)").replace("z = MatMul(x, u)", "z = Neg(u)")
    assert not TransposeWeights()(parse(text.replace("float[1, 2] z", "float[2, 3] z"))).modified
