"""Transpose stored weights: integer initializer -> DQ -> Transpose becomes transposed initializer -> DQ.

TensorRT and ONNX Runtime want DQ directly in front of the MatMul (rule R16); torch
exports a linear layer on rank-3 data with a Transpose between them.
"""

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import axis_of, constant_of, new_initializer, only_consumer, weight_dequantizers


class TransposeWeights(ir.passes.InPlacePass):
    """Moves a Transpose of a dequantized weight into the stored integers, and its channel axis along."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every DQ whose only reader is a Transpose."""
        modified = False
        for node, stored in list(weight_dequantizers(model.graph)):
            transpose = only_consumer(node.outputs[0], "Transpose")
            codes, scale = constant_of(stored), constant_of(node.inputs[1])
            if transpose is None or codes is None or scale is None:
                continue
            order = list(transpose.attributes.get_ints("perm", list(range(codes.ndim))[::-1]))
            node.replace_input_with(0, new_initializer(model.graph, f"{stored.name}.t", np.transpose(codes, order)))
            axis = axis_of(node, scale)
            if axis is not None:
                node.attributes["axis"] = ir.AttrInt64("axis", order.index(axis))
            node.outputs[0].shape = ir.Shape([codes.shape[i] for i in order])
            ir.convenience.replace_all_uses_with(transpose.outputs[0], node.outputs[0])
            model.graph.remove(transpose, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
