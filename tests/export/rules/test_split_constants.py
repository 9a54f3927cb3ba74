"""A Split of a constant becomes constants."""

import numpy as np
import pytest

from fakequant.export.rules.split_constants import SplitConstants

TEXT = """
agraph (float[1, 2] x) => (float[1, 2] y)
<float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[2] sizes = {2, 2}>
{ a, b = Split<axis = 0>(w, sizes) c = MatMul(x, a) y = MatMul(c, b) }
"""
X = np.array([[2.0, -1.0]], np.float32)


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.replace("<axis = 0>(w, sizes)", "<axis = 0, num_outputs = 2>(w)")], ids=["sizes", "equal"]
)
def test_the_graph_computes_the_same(parse, run, ops, text):
    model = parse(text)
    (before,) = run(model, x=X)
    assert SplitConstants()(model).modified
    assert ops(model) == ["MatMul", "MatMul"]
    np.testing.assert_array_equal(run(model, x=X)[0], before)


def test_parts_of_other_sizes_and_another_axis(parse, run):
    text = (
        TEXT.replace("axis = 0", "axis = 1")
        .replace("{2, 2}", "{1, 1}")
        .replace(
            "c = MatMul(x, a) y = MatMul(c, b)",
            "s = Mul(a, b) k = Gemm<transB = 1>(x, w) r = MatMul(k, s) y = Add(x, r)",
        )
    )
    model = parse(text)
    (before,) = run(model, x=X)
    SplitConstants()(model)
    np.testing.assert_array_equal(run(model, x=X)[0], before)


def test_a_split_of_data_stays(parse):
    text = "agraph (float[4, 2] x) => (float[2, 2] y) { a, b = Split<axis = 0, num_outputs = 2>(x) y = Add(a, b) }"
    assert not SplitConstants()(parse(text)).modified
