"""What is a layer: a call with a weight; and which layers come first and last."""

from fakequant.call_sites import RECURRENT_ROLES, Call, Role, TensorGraph, Value


def is_weighted(call: Call) -> bool:
    """Whether a call multiplies by a weight, its second operand."""
    if call.role is Role.PRODUCT:
        weight = call.operand(1)
        return weight is not None and weight.is_constant
    return call.role is Role.WEIGHTED


def is_layer(call: Call) -> bool:
    """Whether a call multiplies by a weight, or by several."""
    return is_weighted(call) or call.role in RECURRENT_ROLES


def why_no_layer(call: Call) -> str:
    """Return why a weighted call cannot be quantized by any target, "" if it can."""
    value, weight = call.operand(0), call.operand(1)
    if value is None or weight is None:
        return "its weight is no tensor"
    if not value.is_activation:
        return "computed from constants only"
    if not weight.is_constant:
        return "its weight is computed from the input"
    if call.role is Role.PRODUCT and len(weight.shape) != 2:
        return "a batched weight has no channel axis"
    return ""


def layer_positions(graph: TensorGraph) -> dict[str, frozenset[str]]:
    """Return {name of a layer: "first", "last", both or none}.

    First is a layer without another between it and the model's input, last one without
    another between it and the model's output; a model has as many as it has ways.
    """
    behind: set[Value] = set()  # values that a layer's output has reached
    first = set()
    for call in graph.calls:
        reached = any(value in behind for value in call.operands)
        if is_layer(call) and not reached:
            first.add(call.name)
        if is_layer(call) or reached:
            behind.update(call.outputs)
    ahead: set[Value] = set()  # values from which a layer is reached
    last = set()
    for call in reversed(graph.calls):
        reaches = any(value in ahead for value in call.outputs)
        if is_layer(call) and not reaches:
            last.add(call.name)
        if is_layer(call) or reaches:
            ahead.update(value for value in call.operands if value is not None)
    names = {call.name for call in graph.calls if is_layer(call)}
    return {
        name: frozenset(word for word, found in (("first", first), ("last", last)) if name in found) for name in names
    }
