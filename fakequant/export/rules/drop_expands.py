"""Drop the Expand that torch's TorchScript exporter puts behind ``x += y`` where sizes are dynamic.

It expands the sum to the shape of x, which is one of its operands::

    Expand(Add(x, y), Shape(x)) = Add(x, y)

Between an op and its Q, it would cost ONNX Runtime the integer kernel.
"""

import onnx_ir as ir

from fakequant.export.graph import DOMAIN, produced_by

_BROADCASTING = frozenset({"Add", "Div", "Mul", "Sub"})


class DropExpands(ir.passes.InPlacePass):
    """Removes every Expand of a result to the shape of an operand, also of one that a quantizer is in front of."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove."""
        nodes = [node for node in model.graph if node.op_type == "Expand" and _is_identity(node)]
        for node in nodes:
            result = node.inputs[0]
            assert result is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_identity(expand: ir.Node) -> bool:
    result, shape = expand.inputs[0], produced_by(expand.inputs[1], "Shape")
    made = None if result is None else result.producer()
    if made is None or made.op_type not in _BROADCASTING or shape is None or shape.attributes:
        return False
    return _unquantized(shape.inputs[0]) in [_unquantized(operand) for operand in made.inputs]


def _unquantized(value: ir.Value | None) -> ir.Value | None:
    """Return what is in front of the markers of quantizers."""
    while value is not None and (node := value.producer()) is not None and node.domain == DOMAIN:
        value = node.inputs[0]
    return value
