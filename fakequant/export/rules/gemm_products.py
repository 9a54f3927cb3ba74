"""Write a Gemm as a product and a sum, where its data is float or quantized in each call.

ONNX Runtime makes MatMulNBits of a MatMul with a DequantizeLinear in front of its weight [K, N], and
MatMulInteger knows no other layout. A Gemm of data with a fixed scale has its integer kernel anyway, but rounds its
bias to steps of s_x s_w: where these are large, which few bits make them, the bias is added to the product as well.
The bias of a weight-only product is added by Sum: an Add would make a Gemm of it again, and with a Relu behind it a
float one (seen in 1.31).
"""

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import constant_of, is_dequantized, only_consumer, produced_by, weight_dequantizers
from fakequant.export.rules.biases import integer_bias
from fakequant.export.rules.transpose_weights import transpose_stored

_LEAST_SQNR = 1e5
"""50 dB, as a ratio of squares."""


class GemmProducts(ir.passes.InPlacePass):
    """Replaces the Gemms of every stored weight that nothing else reads: one, or one for each call of a layer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        modified = False
        for dequantize, _ in list(weight_dequantizers(model.graph)):
            gemms = _only_gemms(dequantize.outputs[0])
            if any(gemm.attributes.get_int("transB", 0) for gemm in gemms):
                transpose_stored(model.graph, dequantize, [1, 0])
            for gemm in gemms:
                _split(model.graph, gemm)
            modified |= bool(gemms)
        return ir.passes.PassResult(model, modified)


def _only_gemms(weight: ir.Value) -> list[ir.Node]:
    """Return what reads a weight if each is a Gemm to be split, all of one layout; otherwise none."""
    if weight.is_graph_output():
        return []
    gemms = [node for node, operand in weight.uses() if operand == 1 and _is_to_be_split(node)]
    layouts = {gemm.attributes.get_int("transB", 0) for gemm in gemms}
    return gemms if len(gemms) == len(weight.uses()) and len(layouts) == 1 else []


def _is_to_be_split(node: ir.Node) -> bool:
    data = produced_by(node.inputs[0], "DequantizeLinear")
    has_fixed_scale = data is not None and constant_of(data.inputs[1]) is not None
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    is_plain = node.op_type == "Gemm" and factors == [1, 1] and not node.attributes.get_int("transA", 0)
    return is_plain and (not has_fixed_scale or _rounds_its_bias(node))


def _rounds_its_bias(gemm: ir.Node) -> bool:
    """Whether rounding the bias to integers, in steps of s_x s_w, may leave less than 50 dB of the result.

    In these steps the error of each output is 1 / 12 in the mean square, and the product is the sum of its weight's
    squared codes at least, if codes of data are 1 or more.
    """
    if integer_bias(gemm) is None or only_consumer(gemm.outputs[0], "QuantizeLinear") is not None:
        return False
    dequantize = produced_by(gemm.inputs[1], "DequantizeLinear")
    codes = None if dequantize is None else constant_of(dequantize.inputs[0])
    if codes is None:
        return False
    outputs = codes.shape[0 if gemm.attributes.get_int("transB", 0) else 1]
    return bool(12 * np.square(codes, dtype=np.float64).sum() / outputs < _LEAST_SQNR)


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    data, weight, *bias = gemm.inputs
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
