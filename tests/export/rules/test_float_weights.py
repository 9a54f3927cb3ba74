import numpy as np
import pytest

from fakequant.export.graph import QUANTIZER_KEY, constant_of
from fakequant.export.rules.float_weights import FloatWeights

PER_CHANNEL = """
agraph (float[1, 2] x) => (float[1, 2] y)
<int8[2, 2] w = {-127, 5, 0, 127}, float[2] s = {0.1, 0.3}, int8[2] z = {0, 0}>
{ d = DequantizeLinear<axis = 1>(w, s, z) y = MatMul(x, d) }
"""
PER_TENSOR = PER_CHANNEL.replace(
    "float[2] s = {0.1, 0.3}, int8[2] z = {0, 0}", "float s = {0.1}, int8 z = {0}"
).replace("<axis = 1>", "")
X = np.array([[1.0, -2.0]], dtype=np.float32)


@pytest.mark.parametrize("text", [PER_CHANNEL, PER_TENSOR], ids=["per-channel", "per-tensor"])
def test_a_q_stands_in_front_of_the_dq(parse, ops, text):
    model = parse(text)
    assert FloatWeights()(model).modified
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "MatMul"]
    assert constant_of(model.graph[0].inputs[0]).dtype == np.float32


@pytest.mark.parametrize("text", [PER_CHANNEL, PER_TENSOR], ids=["per-channel", "per-tensor"])
def test_the_graph_gives_the_same_bits(parse, run, text):
    model = parse(text)
    (before,) = run(model, x=X)
    FloatWeights()(model)
    np.testing.assert_array_equal(run(model, x=X)[0], before)


def test_q_and_dq_agree_on_the_axis(parse):
    model = parse(PER_CHANNEL)
    FloatWeights()(model)
    assert [n.attributes.get_int("axis") for n in list(model.graph)[:2]] == [1, 1]


def test_q_has_the_quantizers_name(parse):
    model = parse(PER_CHANNEL, {"d": {QUANTIZER_KEY: "fc._weight_quantizer"}})
    FloatWeights()(model)
    assert model.graph[0].metadata_props[QUANTIZER_KEY] == "fc._weight_quantizer"


def test_an_activation_stays(parse):
    model = parse("""
    agraph (int8[1, 2] x) => (float[1, 2] y)
    <float s = {0.5}, int8 z = {0}>
    { y = DequantizeLinear(x, s, z) }
    """)
    assert not FloatWeights()(model).modified
