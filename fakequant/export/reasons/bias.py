"""The bias of a Conv or Gemm, also of one that ONNX Runtime makes of a MatMul and an Add (matmul_add_fusion.cc)."""

import onnx_ir as ir

from fakequant.export.quantized_edges import dequantizer_of, only_reader


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return what is added to a product, None for nothing."""
    if node.op_type in {"Conv", "Gemm"}:
        return node.inputs[2] if len(node.inputs) > 2 else None
    add = fused_add(node)
    return None if add is None else _other_operand(add, node.outputs[0])


def fused_add(node: ir.Node) -> ir.Node | None:
    """Return the Add that becomes one Gemm with a MatMul in front of it; None if they stay two."""
    add = only_reader(node.outputs[0]) if node.op_type == "MatMul" else None
    if add is None or add.op_type != "Add":
        return None
    data, weight, bias = (
        shape_of(node.inputs[0]),
        shape_of(node.inputs[1]),
        shape_of(_other_operand(add, node.outputs[0])),
    )
    if data is None or weight is None or bias is None or len(weight) != 2:
        return None
    if len(data) == 2:
        fits = bias in [weight[1:], [1, weight[1]], [data[0], 1], [data[0], weight[1]]]
    else:  # reshaped to two dimensions, which must be known
        fits = bias == weight[1:] and all(isinstance(size, int) for size in data)
    return add if fits else None


def result_of(node: ir.Node) -> ir.Value:
    """Return what the kernel of a node makes: what the Add makes where that becomes one with it."""
    return (fused_add(node) or node).outputs[0]


def columns_of(node: ir.Node) -> int | str | None:
    """Return how many columns a Gemm or MatMul has."""
    weight = shape_of(node.inputs[1])
    return None if not weight else weight[0 if node.attributes.get_int("transB", 0) else -1]


def _other_operand(add: ir.Node, operand: ir.Value) -> ir.Value | None:
    return add.inputs[1] if add.inputs[0] is operand else add.inputs[0]


def shape_of(value: ir.Value | None) -> list[int | str | None] | None:
    """Return the shape of a value, a size that is not known by its name."""
    if value is None:
        return None
    if value.shape is None:
        dequantizer = dequantizer_of(value)
        stored = None if dequantizer is None or dequantizer.outputs[0] is not value else dequantizer.inputs[0]
        return shape_of(stored)
    return [size if isinstance(size, int) else size.value for size in value.shape]
