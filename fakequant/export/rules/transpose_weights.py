"""Transpose stored weights: integer initializer -> DQ -> Transpose becomes transposed initializer -> DQ.

TensorRT and ONNX Runtime want DQ directly in front of the MatMul (rule R16); torch
exports a linear layer on rank-3 data with a Transpose between them.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import axis_of, constant_of, new_initializer, weight_dequantizers


class TransposeWeights(ir.passes.InPlacePass):
    """Moves a Transpose of a dequantized weight into the stored integers, and its channel axis along."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every DQ that is only transposed: by one reader, or by each layer that ties the weight."""
        modified = False
        for node, stored in list(weight_dequantizers(model.graph)):
            if stored.shape is None or constant_of(node.inputs[1]) is None:
                continue
            transposes, order = _only_transposes(node.outputs[0], stored.shape.rank())
            if transposes:
                transpose_stored(model.graph, node, order)
            for transpose in transposes:
                ir.convenience.replace_all_uses_with(transpose.outputs[0], node.outputs[0])
                model.graph.remove(transpose, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _only_transposes(weight: ir.Value, rank: int) -> tuple[list[ir.Node], Sequence[int]]:
    """Return what reads a weight, and the order of axes, if each is a Transpose to that order; otherwise none."""
    readers = list(weight.consumers())
    orders = {tuple(node.attributes.get_ints("perm", range(rank)[::-1])) for node in readers}
    is_only = len(orders) == 1 and all(node.op_type == "Transpose" for node in readers)
    return (readers, orders.pop()) if is_only and not weight.is_graph_output() else ([], ())


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
