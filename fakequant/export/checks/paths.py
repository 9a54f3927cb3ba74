"""Ways through a graph: what is quantized, what becomes of an output, what is fused into a convolution."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.view import FLOATS, View
from fakequant.export.graph import produced_by

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
WEIGHTED = CONVOLUTIONS | {"Gemm", "MatMul"}

_MOVES = frozenset(
    {
        *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth"),
        *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Ops that only move elements of their first input: Q and DQ pass them (rule R36)."""

ACTIVATIONS = frozenset(
    {
        *("BatchNormalization", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu"),
        *("Relu", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh"),
    }
)
"""What engines fuse behind a convolution (rule R32)."""


def moves(node: ir.Node) -> bool:
    """Whether a node only moves elements of its first input."""
    if node.domain != "":
        return False
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Pad":
        return pads_zeros(node)
    return node.op_type in _MOVES


def pads_zeros(node: ir.Node) -> bool:
    """Whether a Pad writes zeros; False where the value is computed."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and not tensor.numpy().any()


def dequantizers(value: ir.Value | None) -> tuple[ir.Node, ...]:
    """Return the DQs that a value comes from through ops that move elements; () if a part of it comes from elsewhere.

    Only Concat makes them several.
    """
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return ()
    if node.op_type == "DequantizeLinear":
        return (node,)
    if node.op_type == "Concat":
        parts = [dequantizers(part) for part in node.inputs]
        return tuple(dq for part in parts for dq in part) if all(parts) else ()
    # A Cast between floats is rule R20; what is behind it counts as quantized all the same.
    passes = moves(node) or (node.op_type == "Cast" and node.outputs[0].dtype in FLOATS)
    return dequantizers(node.inputs[0]) if passes else ()


def is_quantized(value: ir.Value | None) -> bool:
    """Whether a value comes from DQ."""
    return bool(dequantizers(value))


def readers(value: ir.Value, through: frozenset[str] = frozenset()) -> Iterator[ir.Node]:
    """Yield the nodes that read a value, directly or behind ops that move elements or are one of ``through``."""
    waiting, seen = [value], {value}
    while waiting:
        for node, index in waiting.pop().uses():
            passes = node.op_type in through or node.op_type == "Concat" or (moves(node) and index == 0)
            if node.domain != "" or not passes:
                yield node
                continue
            waiting += [output for output in node.outputs if output not in seen]
            seen.update(node.outputs)


def becomes_quantized(value: ir.Value) -> bool:
    """Whether some reader of a value quantizes it, behind activations too."""
    return any(node.op_type == "QuantizeLinear" for node in readers(value, ACTIVATIONS | {"Mul"}))


def quantized_convolution(value: ir.Value | None) -> ir.Node | None:
    """Return the quantized convolution that a value is fused into: nothing between reads it or is read by others."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    while (node := value.producer()) is not None and node.domain == "":
        if node.op_type in CONVOLUTIONS:
            return node if is_quantized(node.inputs[0]) and is_quantized(node.inputs[1]) else None
        source, others = _activated(node)
        if source is None or source.is_graph_output() or not set(source.consumers()) <= {node, *others}:
            return None
        value = source
    return None


def _activated(node: ir.Node) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """Return what an activation is applied to, and its gate where it is written as ``x * sigmoid(x)``."""
    if node.op_type in ACTIVATIONS:
        return node.inputs[0], ()
    if node.op_type == "Mul":
        for gate, data in (node.inputs, reversed(node.inputs)):
            producer = None if gate is None else gate.producer()
            if producer is not None and producer.op_type in ACTIVATIONS and producer.inputs[0] is data:
                return data, (producer,)
    return None, ()


def same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Whether the file says that two values have the same shape, by sizes or by their names."""
    if one.shape is None or other.shape is None or one.shape.rank() != other.shape.rank():
        return False
    # Two sizes that have no name may be equal or not.
    return all(
        a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one.shape, other.shape, strict=True)
    )


def activations(view: View, node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that depend on the graph's inputs."""
    return [value for value in node.inputs if value is not None and not view.is_constant(value)]


def weight_quantizer(view: View, node: ir.Node) -> ir.Node | None:
    """Return the DQ right in front of a weighted node's constant weight."""
    dequantize = produced_by(node.inputs[1], "DequantizeLinear")
    return dequantize if dequantize is not None and view.is_constant(node.inputs[1]) else None
