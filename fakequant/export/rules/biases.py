"""Give biases of linear layers the form in which ONNX Runtime computes the layer in integers.

Gemm without a Q behind it: int32 codes with scale s_x s_w and a DequantizeLinear, so that
the layer is one integer product with a float result. MatMul with Add: shape [1, 1, N]; an
Add of shape [N] would be fused into a Gemm with a float bias, which has no integer kernel.
Behind a product of two dimensions or one that shape would give it more: there the Add becomes Sum.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import constant_of, new_initializer, only_consumer, produced_by

_LARGEST = 2**31 - 1
_EIGHT_BITS = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


class Biases(ir.passes.InPlacePass):
    """Rewrites the bias of every Gemm and MatMul of which both inputs are dequantized."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; a bias beyond int32 stays float."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Gemm" and only_consumer(node.outputs[0], "QuantizeLinear") is None:
                modified |= _in_integers(model.graph, node)
            elif node.op_type == "MatMul" and produced_by(node.inputs[1], "DequantizeLinear"):
                modified |= _unfused(model.graph, node)
        return ir.passes.PassResult(model, modified)


def integer_bias(gemm: ir.Node) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    """Return a product's bias as int32 codes and their scale, s_x s_w; None without one or without fixed scales."""
    scales = [
        constant_of(dequantize.inputs[1])
        for value in gemm.inputs[:2]
        if (dequantize := produced_by(value, "DequantizeLinear")) and _has_integer_kernel(dequantize)
    ]
    bias = constant_of(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    if bias is None or len(scales) != 2 or any(s is None for s in scales) or bias.dtype != np.float32 or bias.ndim != 1:
        return None
    scale = np.multiply(scales[0].astype(np.float64), scales[1].astype(np.float64)).astype(np.float32)  # type: ignore[union-attr]
    codes = np.rint(bias.astype(np.float64) / scale)
    if scale.min() == 0 or np.abs(codes).max(initial=0) > _LARGEST:
        return None
    return codes.astype(np.int32), scale


def _in_integers(graph: ir.Graph, gemm: ir.Node) -> bool:
    found = integer_bias(gemm)
    if found is None:
        return False
    codes, scale = found
    value = gemm.inputs[2]
    assert value is not None
    inputs = [
        new_initializer(graph, f"{value.name}.codes", codes),
        new_initializer(graph, f"{value.name}.scale", scale),
    ]
    attributes = {"axis": 0} if scale.ndim else {}
    dequantize = ir.node("DequantizeLinear", inputs, attributes, name=f"{inputs[0].name}.DequantizeLinear")
    dequantize.outputs[0].type, dequantize.outputs[0].shape = value.type, value.shape
    graph.insert_before(gemm, dequantize)
    gemm.replace_input_with(2, dequantize.outputs[0])
    return True


def _has_integer_kernel(dequantize: ir.Node) -> bool:
    codes = dequantize.inputs[0]
    return codes is not None and codes.dtype in _EIGHT_BITS and "block_size" not in dequantize.attributes


def _unfused(graph: ir.Graph, product: ir.Node) -> bool:
    add = only_consumer(product.outputs[0], "Add")
    if add is None:
        return False
    index = 1 if add.inputs[0] is product.outputs[0] else 0
    bias = constant_of(add.inputs[index])
    if bias is None or bias.ndim != 1:
        return False
    shape = product.outputs[0].shape
    if shape is not None and shape.rank() <= 2:
        add.op_type = "Sum"
        return True
    value = add.inputs[index]
    assert value is not None
    add.replace_input_with(index, new_initializer(graph, f"{value.name}.row", bias.reshape(1, 1, -1)))
    return True
