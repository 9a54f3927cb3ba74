"""Reading a Q/DQ graph: the few questions that rules, reports and validation all ask."""

import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

QUANTIZER_KEY = "fakequant.quantizer"
"""Node metadata: full name of the TensorQuantizer that a Q or DQ comes from."""

CALL_KEY = "fakequant.call"
"""Node metadata: the how-manieth call of that quantizer, from 0."""

TARGET_KEY = "fakequant.target"
"""Model metadata: the target that a file was made for."""

FLOAT_DTYPE_KEY = "fakequant.float_dtype"
"""Model metadata: the float type of a file that is not float32."""

MODULE_KEY = "fakequant.module"
"""Node metadata: full name of the torch module that a node comes from."""

FLOAT8 = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
"""Types of FP8 codes."""

DOMAIN, MARKER = "fakequant", "Quantizer"
"""Domain and type of the node that stands for one call of a quantizer while torch traces; attribute ``name``."""


def constant_of(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the array of an initializer or Constant node's output, None for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes value if it is one of op_type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def quantized_in_call(value: ir.Value | None) -> ir.Node | None:
    """Return the DynamicQuantizeLinear that a value is dequantized from."""
    dequantize = produced_by(value, "DequantizeLinear")
    return None if dequantize is None else produced_by(dequantize.inputs[0], "DynamicQuantizeLinear")


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes a value, or its product with a scale that the graph computes.

    A Max of one operand in between does nothing.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type not in {"Max", "Mul"}:
        return node is not None and node.op_type == "DequantizeLinear"
    inner = produced_by(node.inputs[0], "DequantizeLinear")
    if inner is None or len(node.inputs) == 1:
        return inner is not None
    return QUANTIZER_KEY in inner.metadata_props and _module(inner) == _module(node)


def _module(node: ir.Node) -> str:
    return node.metadata_props.get(MODULE_KEY, "")


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the single node that reads value if it is one of op_type and value is no graph output."""
    consumers = value.consumers()
    if value.is_graph_output() or len(value.uses()) != 1 or consumers[0].op_type != op_type:
        return None
    return consumers[0]


def axis_of(node: ir.Node, scale: NDArray[np.generic]) -> int | None:
    """Return the channel axis of a Q or DQ node, None for per tensor."""
    return None if scale.size == 1 and scale.ndim == 0 else node.attributes.get_int("axis", 1)


def along_axis(vector: NDArray[np.generic], axis: int | None, ndim: int) -> NDArray[np.generic]:
    """Return a scale or zero point shaped to broadcast against data of ndim dimensions."""
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * ndim
    shape[axis] = vector.size
    return vector.reshape(shape)


def weight_dequantizers(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield (DequantizeLinear, integer initializer) for every weight stored as integers."""
    for node in graph:
        if node.op_type == "DequantizeLinear" and constant_of(node.inputs[0]) is not None:
            stored = node.inputs[0]
            assert stored is not None
            yield node, stored


def table_look_ups(graph: ir.Graph) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
    """Yield (DequantizeLinear, the Gathers along axis 0 that read it) for every weight whose rows are looked up."""
    for dequantize, _ in weight_dequantizers(graph):
        values = dequantize.outputs[0]
        look_ups = [
            node
            for node, index in values.uses()
            if node.op_type == "Gather" and index == 0 and not node.attributes.get_int("axis", 0)
        ]
        if look_ups:
            yield dequantize, look_ups


def dequantized_weight(dequantize: ir.Node) -> ir.LazyTensor | None:
    """Return the values of a weight stored as codes; None if its scale is not constant, or one a block.

    Lazy: one weight after the other is in memory as floats, while the file is written.
    """
    codes, scale = constant_of(dequantize.inputs[0]), constant_of(dequantize.inputs[1])
    if codes is None or scale is None or "block_size" in dequantize.attributes:
        return None
    zero_point = constant_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    axis = axis_of(dequantize, scale)
    zeros = np.zeros((), codes.dtype) if zero_point is None else along_axis(zero_point, axis, codes.ndim)
    values = functools.partial(_values, codes, along_axis(scale, axis, codes.ndim), zeros)
    return ir.LazyTensor(values, ir.DataType.from_numpy(scale.dtype), ir.Shape(codes.shape))


def _values(
    codes: NDArray[np.generic], scale: NDArray[np.generic], zero_point: NDArray[np.generic]
) -> ir.TensorProtocol:
    return ir.tensor((codes.astype(scale.dtype) - zero_point.astype(scale.dtype)) * scale)


def remove_unread(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node unless one of the graph reads it; torch leaves readers in graphs that are no part of it."""
    values, nodes = node.outputs[0], set(graph.all_nodes())
    if values.is_graph_output() or any(reader in nodes for reader in values.consumers()):
        return
    for reader, index in tuple(values.uses()):
        reader.replace_input_with(index, None)
    graph.remove(node, safe=True)


def new_initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic] | ir.LazyTensor, dtype: ir.DataType | None = None
) -> ir.Value:
    """Add an initializer under a name that is not taken and return its value; a lazy one is made when it is read."""
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    tensor: ir.TensorProtocol
    tensor = array if isinstance(array, ir.LazyTensor) else ir.tensor(np.asarray(array, order="C"), dtype=dtype)
    tensor.name = unique
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
