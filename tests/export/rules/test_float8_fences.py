"""Around FP8, ONNX Runtime fuses nothing."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from fakequant.export.rules.float8_fences import Float8Fences

BODY = """
agraph (float[2, 3] x) => (float[2, 2] y)
<float[3, 2] w = {1, -2, 3, 4, -8, 7}, float s = {0.5}, int8 z = {0}>
{
    a = Relu(x)
    q = QuantizeLinear(a, s, z)
    d = DequantizeLinear(q, s, z)
    p = QuantizeLinear(w, s, z)
    v = DequantizeLinear(p, s, z)
    y = MatMul(d, v)
}
"""
X = np.array([[0.3, -1.7, 2.9], [0.11, 0.52, -4.4]], np.float32)


def float8(parse) -> ir.Model:
    """Return the graph with E4M3 codes; ONNX text has no such numbers."""
    model = parse(BODY)
    for name in ("q", "p"):
        next(node for node in model.graph if node.outputs[0].name == name).outputs[0].type = ir.TensorType(
            ir.DataType.FLOAT8E4M3FN
        )
    zero = model.graph.initializers["z"]
    zero.const_value = ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="z")
    zero.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    return model


def optimized(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def test_the_optimized_graph_computes_the_same(parse, run):
    model = float8(parse)
    (before,) = run(model, x=X)
    Float8Fences()(model)
    np.testing.assert_array_equal(optimized(model), before)


def test_the_fences_stand_on_both_sides(parse, ops):
    model = float8(parse)
    assert Float8Fences()(model).modified
    assert ops(model)[:5] == ["Relu", "Max", "QuantizeLinear", "DequantizeLinear", "Max"]


@pytest.mark.parametrize(
    "change", [("y = MatMul(d, v)", "y = MatMul(a, v)"), ("int8 z", "uint8 z")], ids=["weight", "uint8"]
)
def test_other_graphs_stay(parse, change):
    text = BODY.replace(*change)
    model = parse(text)
    assert not Float8Fences()(model).modified
