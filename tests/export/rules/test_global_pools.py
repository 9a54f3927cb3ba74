import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from fakequant.export.graph import constant_of
from fakequant.export.rules.global_pools import GlobalPools

DEQUANTIZED = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
ZERO = "float s = {0.5}, uint8 z = {128}"


def model(opset: int, body: str, axes: str, keepdims: int = 0) -> ir.Model:
    """Return a mean of d over axes of [2, 3, 4, 5]."""
    inputs, attribute = ("d, a", "") if opset >= 18 else ("d", f"axes = [{axes}], ")
    length = len(axes.split(","))
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    agraph (float[2,3,4,5] x) => (float y)
    <{ZERO}, int64[{length}] a = {{{axes}}}>
    {{ {body} y = ReduceMean<{attribute}keepdims = {keepdims}>({inputs}) }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


OPSETS = pytest.mark.parametrize("opset", [13, 17, 18, 21])


@OPSETS
@pytest.mark.parametrize("axes", ["2, 3", "-1, -2"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_space_becomes_a_pool_with_the_same_values(run, opset, axes, keepdims):
    graph = model(opset, DEQUANTIZED, axes, keepdims)
    x = np.random.default_rng(0).integers(-20, 20, (2, 3, 4, 5)).astype(np.float32) / 2
    GlobalPools()(graph)
    assert [node.op_type for node in graph.graph][2:] == ["GlobalAveragePool", *["Squeeze"] * (not keepdims)]
    np.testing.assert_allclose(run(graph, x=x)[0], x.mean((2, 3), keepdims=bool(keepdims)), atol=1e-6)


@OPSETS
@pytest.mark.parametrize("axes", ["1", "2", "1, 2", "1, 2, 3"])
def test_a_mean_over_other_axes_stays(opset, axes):
    graph = model(opset, DEQUANTIZED, axes)
    assert not GlobalPools()(graph).modified


@OPSETS
def test_a_mean_of_float_values_stays(opset):
    graph = model(opset, "d = Relu(x)", "2, 3")
    assert not GlobalPools()(graph).modified


def test_the_pool_takes_the_name_and_the_squeeze_its_axes(run):
    graph = model(13, DEQUANTIZED, "2, 3")
    list(graph.graph)[-1].name = "mean"
    GlobalPools()(graph)
    pool, squeeze = list(graph.graph)[2:]
    assert pool.name == "mean"
    assert constant_of(squeeze.inputs[1]).tolist() == [2, 3]
