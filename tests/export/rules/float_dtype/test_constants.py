"""Constants are rounded, but never to inf, and a lone one never to 0."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from fakequant.export.graph import constant_of
from fakequant.export.rules.float_dtype import FloatDtype


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (-3.4028234e38, -65504),
        (-1e9, -65504),
        (70000, 65504),
        (1e-12, 2.0**-24),
        (-1e-12, -(2.0**-24)),
        (0, 0),
        (0.1, np.float16(0.1)),
    ],
)
def test_a_lone_number_is_neither_inf_nor_0(half, value, stored):
    text = f"agraph (float[4] x) => (float[4] y) <float c = {{{value}}}> {{ y = Add(x, c) }}"
    model, rewrite = half(text, y="add")
    assert constant_of(model.graph.initializers["c"]) == np.float16(stored)
    assert list(rewrite.clamped_constants) == ([] if value in {0, 0.1} else ["add"])


def test_the_clamped_number_is_reported(half):
    _, rewrite = half("agraph (float[4] x) => (float[4] y) <float c = {-1e9}> { y = Add(x, c) }", y="add")
    assert rewrite.clamped_constants == {"add": "-1e+09 became -65504"}


def test_a_mask_is_clamped_and_inf_stays(parse):
    model = parse("agraph (float[3] x) => (float[3] y) <float[3] c = {0, -1e9, 1}> { y = Add(x, c) }")
    value = model.graph.initializers["c"]
    value.const_value = ir.tensor(np.float32([1e-12, -1e9, -np.inf]), name="c")
    FloatDtype("float16")(model)
    np.testing.assert_array_equal(constant_of(value), np.float16([0, -65504, -np.inf]))


def test_a_row_that_is_masked_out_is_not_nan(half):
    text = """agraph (float[1, 2] x, int64[1, 2] mask) => (float[1, 2] y)
    <float one = {1}, float lowest = {-3.4028234e38}>
    { m = Cast<to = 1>(mask) n = Sub(one, m) f = Mul(n, lowest) a = Add(x, f) y = Softmax(a) }"""
    model, _ = half(text)
    feeds = {"x": np.float16([[1, 2]]), "mask": np.int64([[0, 0]])}
    # Not in ONNX Runtime, whose CPU provider computes such a graph in float32.
    (got,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert np.isfinite(got).all()


def test_constant_nodes_are_converted(run, half):
    text = "agraph (float[2] x) => (float[2] y) { c = Constant<value_float = 1.5>() y = Add(x, c) }"
    model, _ = half(text)
    np.testing.assert_array_equal(run(model, x=np.float16([1, 2]))[0], [2.5, 3.5])
