"""Write means over space as GlobalAveragePool, which has an integer kernel in ONNX Runtime; ReduceMean has none.

For x of rank 3 or more, [N, C, ...]::

    ReduceMean(x, axes of everything behind C) = GlobalAveragePool(x), its ones squeezed unless keepdims
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import constant_of, new_initializer, produced_by


class GlobalPools(ir.passes.InPlacePass):
    """Replaces every ReduceMean of dequantized values over exactly the axes behind the channels.

    One of float values has no integer kernel, and may be a part of a layer norm, which ONNX Runtime recognizes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        nodes = [node for node in model.graph if node.op_type == "ReduceMean" and _is_over_space(node)]
        for node in nodes:
            _replace(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_over_space(node: ir.Node) -> bool:
    value, axes = node.inputs[0], _axes(node)
    if value is None or value.shape is None or axes is None or not produced_by(value, "DequantizeLinear"):
        return False
    rank = len(value.shape)
    return rank >= 3 and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _axes(node: ir.Node) -> Sequence[int] | None:
    """Return the axes, an input since opset 18 and an attribute before; None if they are not written or not known."""
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if axes is None else [int(axis) for axis in axes.reshape(-1)]


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    assert value.shape is not None
    pool = ir.node("GlobalAveragePool", [value], name=node.name)
    pool.metadata_props.update(node.metadata_props)
    pooled = pool.outputs[0]
    pooled.type, pooled.shape = output.type, ir.Shape([*value.shape[:2], *[1] * (len(value.shape) - 2)])
    new = [pool]
    if not node.attributes.get_int("keepdims", 1):
        axes = np.arange(2, len(value.shape), dtype=np.int64)
        new.append(ir.node("Squeeze", [pooled, new_initializer(graph, f"{output.name}.axes", axes)]))
        new[-1].outputs[0].type, new[-1].outputs[0].shape = output.type, output.shape
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(output, new[-1].outputs[0], replace_graph_outputs=True)
    new[-1].outputs[0].name = output.name
    graph.remove(node, safe=True)
