"""Which values are never negative, whatever the input: their codes may start at 0."""

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value
from fakequant.placement.groups import Groups, preserves_scale

_FROM_ZERO = frozenset({"sigmoid", "hardsigmoid", "softmax", "softplus"})
_BOUNDS = {"hardtanh": "min_val", "clamp": "min"}


def cuts_negatives(call: Call) -> bool:
    """Whether a call gives 0 for every negative element: ReLU, and clamps from 0, such as torch's ReLU6."""
    lowest = call.arguments.get(_BOUNDS.get(call.kind, ""))
    return call.kind in {"relu", "relu6"} or (isinstance(lowest, int | float) and lowest == 0)


def never_negative(graph: TensorGraph, groups: Groups) -> set[Value]:
    """Return the representatives of the groups of which no value is ever negative."""
    found: set[Value] = set()
    for call in graph.calls:
        if _gives_nonnegative(call, found):
            found.update(call.outputs)
    values = {value for call in graph.calls for value in (*call.operands, *call.outputs) if value is not None}
    mixed = {groups.of(value) for value in values if value.is_activation and value not in found}
    return {groups.of(value) for value in found} - mixed


def _gives_nonnegative(call: Call, known: set[Value]) -> bool:
    if call.kind in _FROM_ZERO or cuts_negatives(call):
        return True
    operands = [value for value in call.operands if value is not None]
    if not operands or not all(value in known for value in operands):
        return False
    if call.role in (Role.ADD, Role.MULTIPLY):
        return call.kind != "sub" and len(operands) == 2
    return call.role is Role.AVERAGE or preserves_scale(call)
