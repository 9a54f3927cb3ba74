"""Keep ONNX Runtime from fusing what is around FP8, for which it has no kernels.

It looks for Q and DQ, not at their types: of a product or convolution between FP8 ones it makes an integer one,
and then refuses the file; a Relu in front of an FP8 Q it drops, as if the Q cut off what is negative (both seen
in 1.31). A Max of one operand does nothing and is neither moved nor fused: one stands in front of each Q, and
one behind each DQ.
"""

import onnx_ir as ir

from fakequant.export.graph import FLOAT8, constant_of


class Float8Fences(ir.passes.InPlacePass):
    """Puts a Max on both sides of every Q and DQ of an FP8 activation."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put them there."""
        quantizers = [node for node in model.graph if _is_float8_activation(node)]
        for quantize in quantizers:
            data = quantize.inputs[0]
            assert data is not None
            fence = _fence(data)
            model.graph.insert_before(quantize, fence)
            quantize.replace_input_with(0, fence.outputs[0])
            for dequantize in quantize.outputs[0].consumers():
                values = dequantize.outputs[0]
                readers = list(values.uses())
                fence = _fence(values)
                model.graph.insert_after(dequantize, fence)
                for reader, index in readers:
                    reader.replace_input_with(index, fence.outputs[0])
        return ir.passes.PassResult(model, modified=bool(quantizers))


def _is_float8_activation(node: ir.Node) -> bool:
    is_float8 = node.op_type == "QuantizeLinear" and node.outputs[0].dtype in FLOAT8
    return is_float8 and constant_of(node.inputs[0]) is None


def _fence(value: ir.Value) -> ir.Node:
    fence = ir.node("Max", [value])
    fence.outputs[0].type, fence.outputs[0].shape = value.type, value.shape
    return fence
