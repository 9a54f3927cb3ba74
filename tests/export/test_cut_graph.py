import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from fakequant.export.cut_graph import cut_at_quantizers
from fakequant.export.graph import CALL_KEY, QUANTIZER_KEY

TEXT = """
<ir_version: 10, opset_import: ["" : 19]>
agraph (float[4] x) => (float[4] y)
<float s = {0.5}, int8 z = {0}, float t = {0.25}, float[4] w = {1.0, 2.0, 3.0, 4.0}>
{
    q1 = QuantizeLinear(x, s, z)
    d1 = DequantizeLinear(q1, s, z)
    r = Relu(d1)
    q2 = QuantizeLinear(r, t, z)
    d2 = DequantizeLinear(q2, t, z)
    qw = QuantizeLinear(w, t, z)
    dw = DequantizeLinear(qw, t, z)
    y = Add(d2, dw)
}
"""
NAMES = {"q1": ("a", "0"), "q2": ("a\nb", "1"), "qw": ("w", "0")}


@pytest.fixture
def model() -> ir.Model:
    return load(TEXT)


def load(text: str) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    parsed = ir.from_proto(proto)
    for node in parsed.graph:
        if node.outputs[0].name in NAMES:
            quantizer, call = NAMES[node.outputs[0].name]
            node.metadata_props.update({QUANTIZER_KEY: quantizer, CALL_KEY: call})
    return parsed


def test_every_activation_is_a_cut_in_order(model):
    assert [(c.quantizer, c.call, c.given, c.computed) for c in cut_at_quantizers(model)] == [
        ("a", 0, "q1.given", "q1"),
        ("a", 1, "q2.given", "q2"),
    ]


def test_codes_keep_their_type(model):
    assert {cut.dtype for cut in cut_at_quantizers(model)} == {np.dtype(np.int8)}


def test_readers_see_the_given_codes(model):
    cut_at_quantizers(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        "x": np.array([1, 2, 3, 4], dtype=np.float32),
        "q1.given": np.array([-2, 2, 4, 6], dtype=np.int8),
        "q2.given": np.array([0, 0, 0, 4], dtype=np.int8),
    }
    y, q1, q2 = session.run(["y", "q1", "q2"], feeds)
    assert q1.tolist() == [2, 4, 6, 8], "from x"
    assert q2.tolist() == [0, 4, 8, 12], "from q1.given"
    assert y.tolist() == [1.0, 2.0, 3.0, 5.0], "from q2.given"


def test_outputs_keep_their_place(model):
    cut_at_quantizers(model)
    assert [v.name for v in model.graph.outputs] == ["y", "q1", "q2"]
    assert [v.name for v in model.graph.inputs] == ["x", "q1.given", "q2.given"]


def test_codes_that_are_an_output_already_are_not_added_again():
    model = load(TEXT.replace("(float[4] y)", "(float[4] y, int8[4] q1)"))
    cut_at_quantizers(model)
    assert [v.name for v in model.graph.outputs] == ["y", "q1", "q2"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(TEXT.replace("q1", "p1").replace("q2", "p2"), id="no-name"),
        pytest.param(
            TEXT.replace(
                "float s = {0.5}, int8 z = {0}, float t = {0.25}", "float[4] t = {1, 2, 3, 4}, int8[4] z = {0, 0, 0, 0}"
            )
            .replace(", s, z", ", t, z")
            .replace("Linear(", "Linear<axis = 0>("),
            id="per-channel",
        ),
        pytest.param(TEXT.replace("int8", "float8e4m3fn"), id="float8"),
        pytest.param(
            TEXT.replace("(float[4] x)", "(float[4] x, float s, float t)").replace(
                "float s = {0.5}, int8 z = {0}, float t = {0.25}", "int8 z = {0}"
            ),
            id="scale",
        ),
    ],
)
def test_what_is_not_cut(text):
    assert cut_at_quantizers(load(text)) == ()
