"""One Q per tensor: Q/DQ pairs with equal parameters on one tensor become one, shared by all readers.

Several layers that read one tensor (Q, K and V of attention, parallel branches) each
bring a quantizer; calibrated on the same data they have the same range (rule R34).
Pairs with different parameters are left as they are.
"""

import onnx_ir as ir

from fakequant.export.graph import QUANTIZER_KEY, axis_of, constant_of

SEPARATOR = "\n"
"""Between the quantizer names on a node that stands for several."""

_OPS = ("Max", "Min", "Clip", "QuantizeLinear", "DequantizeLinear")


class MergeQuantizers(ir.passes.InPlacePass):
    """Merges equal Q nodes, then equal DQ nodes, that read the same value, and the clamps in front of narrow grids."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge; from the front, so that equal readers of merged nodes then read the same value."""
        merged = sum(_merge(model.graph, op_type) for op_type in _OPS)
        return ir.passes.PassResult(model, modified=merged > 0)


def _merge(graph: ir.Graph, op_type: str) -> int:
    first: dict[tuple[object, ...], ir.Node] = {}
    merged = 0
    for node in list(graph):
        if node.op_type != op_type or len(node.inputs) < 2:  # Max and Min take any number of inputs
            continue
        scale = constant_of(node.inputs[1])
        if scale is None:
            continue
        zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        key = (
            id(node.inputs[0]),
            scale.tobytes(),
            None if zero_point is None else (zero_point.dtype.str, zero_point.tobytes()),
            axis_of(node, scale),
        )
        kept = first.setdefault(key, node)
        if kept is node or node.outputs[0].is_graph_output():
            continue
        names = SEPARATOR.join(n.metadata_props.get(QUANTIZER_KEY, "") for n in (kept, node)).split(SEPARATOR)
        if any(names):
            kept.metadata_props[QUANTIZER_KEY] = SEPARATOR.join(dict.fromkeys(filter(None, names)))
        ir.convenience.replace_all_uses_with(node.outputs[0], kept.outputs[0])
        graph.remove(node, safe=True)
        merged += 1
    return merged
