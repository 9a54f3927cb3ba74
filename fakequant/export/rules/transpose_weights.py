"""Transpose stored weights: integer initializer -> DQ -> Transpose becomes transposed initializer -> DQ.

TensorRT and ONNX Runtime want DQ directly in front of the MatMul (rule R16); torch
exports a linear layer on rank-3 data with a Transpose between them.
"""

from collections.abc import Sequence

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
            scale = constant_of(node.inputs[1])
            if transpose is None or stored.shape is None or scale is None:
                continue
            transpose_stored(model.graph, node, transpose.attributes.get_ints("perm", range(stored.shape.rank())[::-1]))
            ir.convenience.replace_all_uses_with(transpose.outputs[0], node.outputs[0])
            model.graph.remove(transpose, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def transpose_stored(graph: ir.Graph, dequantize: ir.Node, order: Sequence[int]) -> None:
    """Transpose the constant of a DequantizeLinear, and its channel axis or its blocks along."""
    scale = constant_of(dequantize.inputs[1])
    assert scale is not None
    # Scales of blocks have as many dimensions as codes.
    moved = len(dequantize.inputs) if "block_size" in dequantize.attributes else 1
    for index, value in enumerate(dequantize.inputs[:moved]):
        array = constant_of(value)
        assert value is not None
        assert array is not None
        transposed = new_initializer(graph, f"{value.name}.t", np.transpose(array, order), value.dtype)
        dequantize.replace_input_with(index, transposed)
    axis = axis_of(dequantize, scale)
    if axis is not None:
        dequantize.attributes["axis"] = ir.AttrInt64("axis", list(order).index(axis))
    stored = dequantize.inputs[0]
    assert stored is not None
    dequantize.outputs[0].shape = stored.shape
