"""One Q per tensor: Q/DQ pairs with equal parameters on one tensor become one, shared by all readers.

Several layers that read one tensor (Q, K and V of attention, parallel branches) each
bring a quantizer; calibrated on the same data they have the same range (rule R34).
Pairs with different parameters are left as they are.
"""

import onnx_ir as ir

from fakequant.export.graph import QUANTIZER_KEY, constant_of

SEPARATOR = "\n"
"""Between the quantizer names on a node that stands for several."""

_OPS = ("Max", "Min", "Clip", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear")


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
        if node.op_type != op_type:
            continue
        data, *parameters = node.inputs
        numbers = {name: attribute.value for name, attribute in node.attributes.items()}
        key = (data, *map(_identity, parameters), *sorted(numbers.items()))
        kept = first.setdefault(key, node)
        if kept is node or any(output.is_graph_output() for output in node.outputs):
            continue
        names = SEPARATOR.join(n.metadata_props.get(QUANTIZER_KEY, "") for n in (kept, node)).split(SEPARATOR)
        if any(names):
            kept.metadata_props[QUANTIZER_KEY] = SEPARATOR.join(dict.fromkeys(filter(None, names)))
        ir.convenience.replace_all_uses_with(node.outputs, kept.outputs)
        graph.remove(node, safe=True)
        merged += 1
    return merged


def _identity(value: ir.Value | None) -> object:
    """Return what is equal for equal constants, and for nothing else but the value itself."""
    array = constant_of(value)
    return value if array is None else (array.dtype.str, array.shape, array.tobytes())
