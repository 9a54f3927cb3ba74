"""What ONNX Runtime CPU sees in front of and behind an op of a Q/DQ graph.

It moves Q and DQ past ops that only move data, and on x86-64 rewrites int8 activations to
uint8 where one op alone reads them, before it looks for integer kernels. What is asked here
is asked of the graph as written, and answered as that does it.
"""

import onnx_ir as ir

from fakequant.export.graph import constant_of, produced_by
from fakequant.export.grid import Grid, grid_of

PASSES_QDQ = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Ops that Q and DQ are moved past (qdq_propagation.cc). Flatten is not one of them."""

CLIPS = frozenset({"Clip", "Relu"})
"""Ops that a Q behind them can do the work of."""


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that value comes from, past ops that only move data."""
    while value is not None:
        dequantizer = produced_by(value, "DequantizeLinear")
        if dequantizer is not None:
            return dequantizer
        producer = value.producer()
        if producer is None or producer.op_type not in PASSES_QDQ:
            return None
        value = producer.inputs[0]
    return None


def quantizer_behind(value: ir.Value) -> ir.Node | None:
    """Return the QuantizeLinear that alone reads value, past ops that only move data."""
    while (consumer := only_reader(value)) is not None:
        if consumer.op_type == "QuantizeLinear":
            return consumer
        if consumer.op_type not in PASSES_QDQ:
            return None
        value = consumer.outputs[0]
    return None


def merge_equal_quantizers(graph: ir.Graph) -> None:
    """Merge Qs of one value as ONNX Runtime does: scales of one element by value, zero points only if shared.

    An int8 tensor with a Q for each reader stays a fork with one zero point for all of them,
    and is none with a zero point for each.
    """
    first: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph.all_nodes()):
        if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        data, scale, *zero_point = node.inputs
        array = constant_of(scale)
        known = scale if array is None or array.size != 1 else (array.item(), array.shape)
        kept = first.setdefault((data, known, *zero_point, node.attributes.get_int("axis", 1)), node)
        if kept is not node and node.graph is kept.graph and node.graph is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], kept.outputs[0])
            node.graph.remove(node, safe=True)


def behind_clip(value: ir.Value) -> ir.Value:
    """Return the output of the Relu or Clip that alone reads value, value itself without one."""
    reader = only_reader(value)
    return reader.outputs[0] if reader is not None and reader.op_type in CLIPS else value


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads value; None if there are several or it is a graph output."""
    return None if value.is_graph_output() or len(value.uses()) != 1 else value.consumers()[0]


def reads_of(value: ir.Value) -> int:
    """Return how often value is read; being a graph output is one of them."""
    return len(value.uses()) + value.is_graph_output()


def grid_in_front(value: ir.Value | None) -> Grid | None:
    """Return the grid of a value that a DQ makes, None for a float one."""
    dequantizer = dequantizer_of(value)
    if value is None or dequantizer is None:
        return None
    quantizer = produced_by(dequantizer.inputs[0], "QuantizeLinear")
    if value.producer() is not dequantizer:  # moved past an op: the Q and DQ behind it are of this value
        return grid_of(dequantizer, reads_of(value))
    is_weight = quantizer is None or constant_of(quantizer.inputs[0]) is not None
    return grid_of(dequantizer, 1 if quantizer is None else _readers(quantizer), converts=not is_weight)


def grid_behind(value: ir.Value) -> Grid | None:
    """Return the grid that the Q behind value puts it on, None without one."""
    quantizer = quantizer_behind(value)
    if quantizer is None:
        return None
    return grid_of(quantizer, _readers(quantizer) if quantizer is only_reader(value) else 1)


def _readers(quantizer: ir.Node) -> int:
    """Return how many read what a Q makes. Each reader of a shared DQ is given its own (EnsureUniqueDQ)."""
    codes = quantizer.outputs[0]
    reads = int(codes.is_graph_output())
    for consumer, _ in codes.uses():
        reads += max(1, reads_of(consumer.outputs[0])) if consumer.op_type == "DequantizeLinear" else 1
    return reads
