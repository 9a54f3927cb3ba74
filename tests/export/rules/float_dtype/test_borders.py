"""Everything has one type; where a part stays float32, Q and DQ are the border."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from fakequant.export.graph import FLOAT_DTYPE_KEY, constant_of

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16

LINEAR = """
agraph (float[2, 3] x) => (float[2, 2] y)
<float s = {0.1}, int8 z = {0}, int8[3, 2] w = {-127, 5, 0, 127, 64, -3}, float[2] ws = {0.01, 0.003},
 int8[2] wz = {0, 0}, float[2] b = {0.3, -7.7}>
{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear<axis = 1>(w, ws, wz)
  m = MatMul(d, wd) y = Add(m, b) }
"""


X = np.array([[0.31, -2.2, 12.0], [1.0, 0.05, -0.049]], np.float32)


def linear_in_numpy(dtype: np.dtype) -> np.ndarray:
    """Compute LINEAR on X in float64, from what is stored in a type."""
    x, s, ws, b = (
        np.asarray(value, np.float32).astype(dtype).astype(np.float64) for value in (X, 0.1, [0.01, 0.003], [0.3, -7.7])
    )
    w = np.array([[-127, 5], [0, 127], [64, -3]])
    return np.clip(np.rint(x / s), -128, 127) * s @ (w * ws) + b


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_everything_has_the_type_and_nothing_is_cast(parse, ops, half, types, name):
    model, rewrite = half(LINEAR, name)
    dtype = ir.DataType[name.upper()]
    assert set(types(model).values()) == {dtype, ir.DataType.INT8}
    assert {value.dtype for value in model.graph.initializers.values()} == {dtype, ir.DataType.INT8}
    assert ops(model) == ops(parse(LINEAR))
    assert (rewrite.float32_layers, rewrite.clamped_constants) == ({}, {})
    assert model.metadata_props[FLOAT_DTYPE_KEY] == name


def test_onnx_runtime_computes_what_the_float16_numbers_say(run, half):
    model, _ = half(LINEAR)
    (got,) = run(model, x=X.astype(np.float16))
    np.testing.assert_allclose(got, linear_in_numpy(np.float16), rtol=2**-9)


def test_the_onnx_reference_computes_what_the_bfloat16_numbers_say(half):
    model, _ = half(LINEAR, "bfloat16")
    dtype = BFLOAT16.numpy()
    (got,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X.astype(dtype)})
    np.testing.assert_allclose(got.astype(np.float64), linear_in_numpy(dtype), rtol=2**-6)


BEHIND_FLOAT32 = """
agraph (float[4] x) => (float[4] y)
<float two = {2}, float s = {0.1}, int8 z = {0}>
{ p = Pow(x, two) q = QuantizeLinear(p, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }
"""


IN_FRONT_OF_BOTH = """
agraph (float[4] x) => (float[4] y, float[4] v)
<float two = {2}, float s = {0.1}, int8 z = {0}>
{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) p = Pow(d, two) y = Relu(p) v = Relu(d) }
"""


def test_q_behind_a_float32_layer_has_a_float32_scale_with_the_value_of_dqs(half, casts_beside_pairs):
    model, _ = half(BEHIND_FLOAT32)
    q, d = (node for node in model.graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"})
    assert [node.inputs[1].dtype for node in (q, d)] == [FLOAT, FLOAT16]
    assert constant_of(q.inputs[1]) == np.float16(0.1).astype(np.float32)
    assert constant_of(d.inputs[1]) == np.float16(0.1)
    assert casts_beside_pairs(model) == []


def test_a_dq_that_both_types_read_is_doubled(half, casts_beside_pairs):
    model, _ = half(IN_FRONT_OF_BOTH)
    doubled = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert {node.outputs[0].dtype for node in doubled} == {FLOAT, FLOAT16}
    assert len({node.inputs[0] for node in doubled}) == 1
    assert {float(constant_of(node.inputs[1])) for node in doubled} == {float(np.float16(0.1))}
    assert len({node.name for node in doubled}) == 2
    assert casts_beside_pairs(model) == []


def test_a_pair_with_two_equal_scales_gets_one(half):
    text = BEHIND_FLOAT32.replace("float s = {0.1}", "float s = {0.1}, float t = {0.1}").replace(
        "(q, s, z)", "(q, t, z)"
    )
    model, _ = half(text)
    pair = [node for node in model.graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert {float(constant_of(node.inputs[1])) for node in pair} == {float(np.float16(0.1))}


@pytest.mark.parametrize("text", [BEHIND_FLOAT32, IN_FRONT_OF_BOTH], ids=["behind", "in-front"])
def test_a_graph_of_both_types_computes_the_same(parse, run, half, text):
    model, _ = half(text)
    x = np.array([-1.6, 0.23, 3.0, 0.1], np.float16)
    for got, expected in zip(run(model, x=x), run(parse(text), x=x.astype(np.float32)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2**-9)


def test_a_float32_result_is_cast_under_the_name_of_the_output(half):
    model, _ = half("agraph (float[4] x) => (float[4] y) { y = Exp(x) }")
    (output,) = model.graph.outputs
    assert (output.name, output.dtype, output.producer().op_type) == ("y", FLOAT16, "Cast")


def test_a_value_is_cast_once_for_all_readers(ops, half):
    text = "agraph (float[4] x) => (float[4] y) { a = Relu(x) b = Exp(a) c = Log(a) y = Add(b, c) }"
    model, _ = half(text)
    assert ops(model).count("Cast") == 2  # of a, and of the result


def test_ops_between_float32_and_q_stay_float32(ops, half, types):
    text = BEHIND_FLOAT32.replace("p = Pow(x, two)", "t = Pow(x, two) p = Relu(t)")
    model, rewrite = half(text, p="act")
    assert types(model)["p"] == FLOAT
    assert ops(model).count("Cast") == 1
    assert rewrite.float32_layers["act"] == "all that it reads is float32"


def test_an_op_on_float32_and_dq_stays_float32(ops, half, types):
    text = """agraph (float[4] x, float[4] v) => (float[4] y) <float s = {0.1}, int8 z = {0}>
    { q = QuantizeLinear(v, s, z) d = DequantizeLinear(q, s, z) a = Exp(x) b = Add(a, d)
      p = QuantizeLinear(b, s, z) e = DequantizeLinear(p, s, z) y = Relu(e) }"""
    model, _ = half(text)
    assert [types(model)[name] for name in "dbe"] == [FLOAT, FLOAT, FLOAT16]
    assert ops(model).count("Cast") == 1


def test_a_weighted_layer_behind_float32_is_of_the_type(half, types):
    text = """agraph (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
    { a = Exp(x) b = Relu(a) c = MatMul(b, w) y = Neg(c) }"""
    model, _ = half(text)
    assert [types(model)[name] for name in "abc"] == [FLOAT, FLOAT, FLOAT16]


def test_a_constant_that_both_types_read_keeps_its_digits_in_float32(half):
    text = "agraph (float[2] x) => (float[2] y) <float[2] c = {0.1, 0.3}> { a = Mul(x, c) b = Pow(a, c) y = Relu(b) }"
    model, _ = half(text)
    read = {node.op_type: node.inputs[1] for node in model.graph if node.op_type in {"Mul", "Pow"}}
    np.testing.assert_array_equal(constant_of(read["Pow"]), np.float32([0.1, 0.3]))
    np.testing.assert_array_equal(constant_of(read["Mul"]), np.float16([0.1, 0.3]))


def test_a_cast_between_the_float_types_goes_away(ops, half):
    text = """agraph (float16[4] x) => (float16[4] y) <float s = {0.1}, int8 z = {0}>
    { a = Cast<to = 1>(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
      b = Cast<to = 10>(d) y = Relu(b) }"""
    model, _ = half(text)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Relu"]
