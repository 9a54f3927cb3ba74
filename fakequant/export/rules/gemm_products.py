"""Write a Gemm as a product and a sum, where its data is float or quantized in each call.

ONNX Runtime makes MatMulNBits of a MatMul with a DequantizeLinear in front of its weight [K, N], and
MatMulInteger knows no other layout. A Gemm of data with a fixed scale has its integer kernel anyway. The bias
of a weight-only product is added by Sum: an Add would make a Gemm of it again, and with a Relu behind it a float
one (seen in 1.31).
"""

import onnx_ir as ir

from fakequant.export.graph import constant_of, is_dequantized, only_consumer, produced_by
from fakequant.export.rules.transpose_weights import transpose_stored


class GemmProducts(ir.passes.InPlacePass):
    """Replaces every Gemm of a stored weight that it alone reads."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        nodes = [node for node in model.graph if node.op_type == "Gemm" and _is_to_be_split(node)]
        for node in nodes:
            _split(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_to_be_split(gemm: ir.Node) -> bool:
    weight = produced_by(gemm.inputs[1], "DequantizeLinear")
    if weight is None or constant_of(weight.inputs[0]) is None or only_consumer(weight.outputs[0], "Gemm") is None:
        return False
    data = produced_by(gemm.inputs[0], "DequantizeLinear")
    has_fixed_scale = data is not None and constant_of(data.inputs[1]) is not None
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return not has_fixed_scale and factors == [1, 1] and not gemm.attributes.get_int("transA", 0)


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    data, weight, *bias = gemm.inputs
    dequantize = produced_by(weight, "DequantizeLinear")
    assert dequantize is not None
    if gemm.attributes.get_int("transB", 0):
        transpose_stored(graph, dequantize, [1, 0])
    keys = dict(gemm.metadata_props)
    product = ir.node("MatMul", [data, weight], name=gemm.name, metadata_props=keys)
    new, output = [product], gemm.outputs[0]
    if bias:
        adds = "Add" if is_dequantized(data) else "Sum"
        new.append(ir.node(adds, [product.outputs[0], *bias], metadata_props=keys))
    for node in new:
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
    graph.insert_before(gemm, new)
    ir.convenience.replace_all_uses_with(output, new[-1].outputs[0], replace_graph_outputs=True)
    new[-1].outputs[0].name = output.name
    graph.remove(gemm, safe=True)
