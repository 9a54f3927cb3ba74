"""What float16 cannot hold stays float32, with what is around it, and is named."""

import numpy as np
import onnx_ir as ir
import pytest

from fakequant.arithmetic import DEAD_SCALE
from fakequant.export.graph import QUANTIZER_KEY, constant_of
from fakequant.export.rules.float_dtype import FloatDtype

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

CONVOLUTION = """
agraph (float[1, 2, 2, 2] x) => (float[1, 2, 2, 2] y)
<float s = {0.1}, int8 z = {0}, int8[2, 2, 1, 1] w = {127, 1, 8, -127}, float[2] ws = {0.01, 0.02},
 int8[2] wz = {0, 0}, float[2] b = {0.5, -1.0}, float s2 = {0.2}>
{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) wd = DequantizeLinear<axis = 0>(w, ws, wz)
  c = Conv<kernel_shape = [1, 1]>(d, wd, b) r = Relu(c)
  q2 = QuantizeLinear(r, s2, z) d2 = DequantizeLinear(q2, s2, z) y = Relu(d2) }
"""


TOO_LARGE = str(65504 / 128 * 1.01)


TOO_SMALL = str(2.0**-18)


@pytest.mark.parametrize(
    ("old", "new", "kept", "reason"),
    [
        ("s2 = {0.2}", f"s2 = {{{TOO_LARGE}}}", {"conv", "relu", "last"}, "values up to 66159, beyond the 65504 of"),
        ("s2 = {0.2}", f"s2 = {{{TOO_SMALL}}}", {"conv", "relu", "last"}, "a scale of 3.81e-06, below 7.63e-06"),
        ("ws = {0.01, 0.02}", f"ws = {{0.01, {TOO_LARGE}}}", {"conv", "relu"}, "values up to 66159"),
        ("ws = {0.01, 0.02}", f"ws = {{{TOO_SMALL}, {TOO_SMALL}}}", {"conv", "relu"}, "a scale of 3.81e-06"),
        ("b = {0.5, -1.0}", "b = {0.5, -70000}", {"conv", "relu"}, "a constant has 70000, beyond the 65504 of float16"),
    ],
    ids=["large-range", "small-range", "large-weight", "small-weight", "large-bias"],
)
def test_a_layer_beyond_float16_stays_float32_and_is_named(half, types, casts_beside_pairs, old, new, kept, reason):
    model, rewrite = half(CONVOLUTION.replace(old, new), c="conv", r="relu", y="last")
    assert set(rewrite.float32_layers) == kept
    assert reason in rewrite.float32_layers["conv"]
    assert types(model)["c"] == FLOAT
    assert casts_beside_pairs(model) == []


QUANTIZED_WEIGHT = """
agraph (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, -2, 70000, 3}, float ws = {600}, int8 z = {0}>
{ q = QuantizeLinear(w, ws, z) d = DequantizeLinear(q, ws, z) c = MatMul(x, d) y = Relu(c) }
"""
TRANSPOSED_WEIGHT = """
agraph (float[1, 2] x) => (float[1, 2] y) <int8[2, 2] w = {1, -2, 127, 3}, float ws = {600}, int8 z = {0}>
{ d = DequantizeLinear(w, ws, z) t = Transpose(d) c = MatMul(x, t) y = Relu(c) }
"""


@pytest.mark.parametrize(
    ("text", "float32"), [(QUANTIZED_WEIGHT, "dcy"), (TRANSPOSED_WEIGHT, "dtc")], ids=["with-q", "transposed"]
)
def test_a_weight_beyond_float16_stays_float32_up_to_its_layer(half, types, text, float32):
    model, _ = half(text)
    assert {types(model)[name] for name in float32} == {FLOAT}
    assert {node.inputs[1].dtype for node in model.graph if "Linear" in node.op_type} == {FLOAT}


@pytest.mark.parametrize("old", ["s2 = {0.2}", "ws = {0.01, 0.02}"], ids=["range", "weight"])
def test_the_quantizer_is_named(parse, old):
    text = CONVOLUTION.replace(old, old.replace("0.02", TOO_LARGE).replace("0.2}", f"{TOO_LARGE}}}"))
    name = {"q2": {QUANTIZER_KEY: "a._input_quantizer\nb"}, "wd": {QUANTIZER_KEY: "a._input_quantizer\nb"}}
    model = parse(text, name)
    rewrite = FloatDtype("float16")
    rewrite(model)
    assert all("a._input_quantizer, b: " in reason for reason in rewrite.float32_layers.values())


def test_a_layer_beyond_float16_computes_what_it_did(parse, run, half):
    text = CONVOLUTION.replace("s2 = {0.2}", f"s2 = {{{TOO_LARGE}}}").replace("s = {0.1}", "s = {500}")
    text = text.replace("ws = {0.01, 0.02}", "ws = {1, 2}")
    model, _ = half(text)
    x = np.array([60000, -4.0, 0, 9, 1, 30000, -200, 7], np.float16).reshape(1, 2, 2, 2)
    (got,), (expected,) = run(model, x=x), run(parse(text), x=x.astype(np.float32))
    assert expected.max() > 65504  # and so is what the convolution gives
    np.testing.assert_allclose(got, expected, rtol=2**-10)


@pytest.mark.parametrize("text", ["s = {0.1}", "s2 = {0.2}"], ids=["input", "inner"])
def test_bfloat16_holds_every_range(half, text):
    large = CONVOLUTION.replace(text, text[: text.index("{")] + "{1e30}").replace("y = Relu(d2)", "y = Abs(d2)")
    _, rewrite = half(large, "bfloat16", c="conv", y="last")
    assert "last" not in rewrite.float32_layers
    assert rewrite.float32_layers["conv"] == "Conv has no bfloat16 in this opset"


def test_an_input_beyond_float16_stays_float32(half, types):
    model, _ = half(CONVOLUTION.replace("s = {0.1}", f"s = {{{TOO_LARGE}}}"))
    assert types(model)["x"] == FLOAT
    assert types(model)["y"] == FLOAT16


def test_what_a_large_tensor_is_added_to_stays_float32(half, types):
    text = """agraph (float[4] x, float[4] h) => (float[4] y, float[4] u) <float s = {600}, int8 z = {0}>
    { a = Relu(x) b = Add(a, h) c = Relu(b) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
      y = Neg(d) u = Neg(c) }"""
    model, _ = half(text)
    assert [types(model)[name] for name in ("x", "h", "b", "c", "d")] == [FLOAT] * 5


def test_a_weighted_layer_in_front_is_the_last_that_stays(half, types):
    text = """agraph (float[1, 2] x, float k) => (float[1, 2] y, float[1, 2] v)
    <float s = {600}, int8 z = {0}, float[2, 2] w = {1, 2, 3, 4}, float c = {3}>
    { v = Mul(x, c) a = Sigmoid(x) b = MatMul(a, w) d = Mul(b, c)
      q = QuantizeLinear(d, s, z) e = DequantizeLinear(q, s, z) y = Relu(e) }"""
    model, _ = half(text)
    assert [types(model)[name] for name in "xvabd"] == [FLOAT16, FLOAT16, FLOAT16, FLOAT, FLOAT]


@pytest.mark.parametrize(("codes", "kept"), [("int8", False), ("uint8", True)])
def test_the_range_is_that_of_the_codes(half, types, codes, kept):
    text = CONVOLUTION.replace("float s2 = {0.2}", f"float s2 = {{300}}, {codes} z2 = {{0}}")
    model, rewrite = half(text.replace("s2, z)", "s2, z2)"))
    assert (types(model)["r"] == FLOAT) is kept
    assert bool(rewrite.float32_layers) is kept


@pytest.mark.parametrize("scale", [DEAD_SCALE, 2.0**-17, 511.7], ids=["dead", "least", "largest"])
def test_the_scales_that_fit(half, scale):
    model, rewrite = half(CONVOLUTION.replace("s2 = {0.2}", f"s2 = {{{scale}}}"))
    assert rewrite.float32_layers == {}
    q2 = list(model.graph)[-3]
    assert constant_of(q2.inputs[1]) == np.float16(scale)


def test_a_small_channel_of_a_weight_gets_the_least_scale_and_codes_for_it(half):
    model, rewrite = half(CONVOLUTION.replace("ws = {0.01, 0.02}", f"ws = {{0.01, {2.0**-20}}}"))
    (node,) = (node for node in model.graph if node.outputs[0].name == "wd")
    codes, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    np.testing.assert_array_equal(scale, np.float16([0.01, 2.0**-17]))
    np.testing.assert_array_equal(codes.reshape(2, 2), [[127, 1], [1, -16]])
    assert codes.dtype == np.int8
    assert rewrite.float32_layers == {}


def test_tied_codes_are_scaled_once(half):
    text = """agraph (float[1, 2] x) => (float[1, 2] y)
    <int8[2, 2] w = {127, 8, 1, -127}, float[2] s = {0.01, 9.5367431640625e-07}, int8[2] z = {0, 0},
     float[2] t = {0.01, 9.5367431640625e-07}>
    { d = DequantizeLinear<axis = 1>(w, s, z) e = DequantizeLinear<axis = 1>(w, t, z)
      a = MatMul(x, d) y = MatMul(a, e) }"""
    model, _ = half(text)
    np.testing.assert_array_equal(constant_of(model.graph.initializers["w"]), [[127, 1], [1, -16]])
