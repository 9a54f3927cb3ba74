"""An LSTM of a tensor that each call quantizes anew, with stored integer weights, becomes DynamicQuantizeLSTM."""

import numpy as np
import pytest

from fakequant.export.graph import QUANTIZER_KEY
from fakequant.export.rules.integer_lstms import IntegerLstms

TEXT = """
agraph (float[3, 2, 2] x, float[1, 2, 2] h) => (float[3, 1, 2, 2] y, float[1, 2, 2] c)
<int8[8, 2] w = {WEIGHT}, int8[8, 2] r = {WEIGHT}, float[8] s = {SCALE}, int64[3] rows = {1, -1, 2}>
{
    q, xs, xz = DynamicQuantizeLinear(x)
    d = DequantizeLinear(q, xs, xz)
    wf = DequantizeLinear<axis = 0>(w, s)
    w3 = Reshape(wf, rows)
    rf = DequantizeLinear<axis = 0>(r, s)
    r3 = Reshape(rf, rows)
    y, last, c = LSTM<hidden_size = 2>(d, w3, r3, , , h)
}
""".replace("WEIGHT", ", ".join(str(11 * i - 80) for i in range(16))).replace(
    "SCALE", ", ".join(str(0.01 + i / 1000) for i in range(8))
)
STATIC = TEXT.replace(
    "q, xs, xz = DynamicQuantizeLinear(x)", "xs = Constant<value_float = 0.02>() q = QuantizeLinear(x, xs, xz)"
).replace("int64[3] rows", "uint8 xz = {128}, int64[3] rows")
FLOAT_WEIGHT = TEXT.replace("w3 = Reshape(wf, rows)", "n = Neg(wf) w3 = Reshape(n, rows)")
FLOAT_DATA = TEXT.replace("(d, w3", "(x, w3")

FEEDS = {
    "x": np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(3, 2, 2),
    "h": np.linspace(-0.9, 0.7, 4, dtype=np.float32).reshape(1, 2, 2),
}


def test_the_operator_computes_the_same_but_for_its_hidden_state(parse, run, ops):
    model = parse(TEXT)
    expected = run(parse(TEXT), **FEEDS)
    assert IntegerLstms()(model).modified
    model.graph.sort()
    assert ops(model)[-1] == "DynamicQuantizeLSTM"
    assert model.opset_imports["com.microsoft"] == 1
    for found, other in zip(run(model, **FEEDS), expected, strict=True):
        assert 0 < np.abs(found - other).max() < 0.01


def test_outputs_and_quantizers_keep_their_names(parse):
    model = parse(TEXT, {"q": {QUANTIZER_KEY: "lstm._input"}, "y": {QUANTIZER_KEY: "lstm._w\nlstm._r"}})
    IntegerLstms()(model)
    (node,) = [node for node in model.graph if node.op_type == "DynamicQuantizeLSTM"]
    assert [value.name for value in node.outputs] == ["y", "last", "c"]
    assert [value.name for value in model.graph.outputs] == ["y", "c"]
    assert node.outputs[0].shape == (3, 1, 2, 2)
    assert node.metadata_props[QUANTIZER_KEY] == "lstm._input\nlstm._w\nlstm._r"


@pytest.mark.parametrize("text", [STATIC, FLOAT_WEIGHT, FLOAT_DATA], ids=["static", "float weight", "float data"])
def test_other_lstms_stay(parse, ops, text):
    model = parse(text)
    before = ops(model)
    assert not IntegerLstms()(model).modified
    assert ops(model) == before
