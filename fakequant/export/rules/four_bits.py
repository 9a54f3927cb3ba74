"""Store weights whose codes fit into 4 bits as INT4, two in a byte, where their product is of float data.

There ONNX Runtime unpacks them by itself (MatMulNBits). In a product with quantized data they stay int8,
for which it has an integer kernel. DequantizeLinear knows INT4 from opset 21 on.
"""

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import constant_of, is_dequantized, new_initializer, weight_dequantizers

_FIRST_WITH_INT4 = 21
_LOWEST, _HIGHEST = -8, 7


class FourBits(ir.passes.InPlacePass):
    """Rewrites the int8 codes of every weight that only MatMuls of float data read."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite."""
        modified = False
        if model.opset_imports[""] >= _FIRST_WITH_INT4:
            for node, stored in list(weight_dequantizers(model.graph)):
                codes = constant_of(stored)
                if codes is not None and codes.dtype == np.int8 and _reads_floats(node) and _fits(codes):
                    _rewrite(model.graph, node)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _fits(codes: np.ndarray) -> bool:
    return bool(codes.size and codes.min() >= _LOWEST and codes.max() <= _HIGHEST)


def _reads_floats(dequantize: ir.Node) -> bool:
    readers = dequantize.outputs[0].consumers()
    return bool(readers) and all(node.op_type == "MatMul" and not is_dequantized(node.inputs[0]) for node in readers)


def _rewrite(graph: ir.Graph, dequantize: ir.Node) -> None:
    int4 = ir.DataType.INT4
    for index in (0, 2):
        value = dequantize.inputs[index]
        array = constant_of(value)
        assert value is not None
        assert array is not None
        packed = new_initializer(graph, f"{value.name}.int4", array.astype(int4.numpy()), int4)
        dequantize.replace_input_with(index, packed)
