"""Squeeze-and-excite: a feature map multiplied by a gate that is computed from its spatial average."""

import dataclasses

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value


@dataclasses.dataclass(frozen=True)
class Gate:
    """One gated product.

    Args:
        product: the multiplication.
        feature: operand that is the feature map.
        layers: weighted calls between the average and the gate; each sees one pixel.
    """

    product: Call
    feature: int
    layers: tuple[Call, ...]


def find_gates(graph: TensorGraph) -> list[Gate]:
    """Return every squeeze-and-excite of a graph."""
    found = []
    for call in graph.calls:
        if call.role is not Role.MULTIPLY:
            continue
        one, other = call.operand(0), call.operand(1)
        if one is None or other is None or not (one.is_activation and other.is_activation):
            continue
        for feature, gate in ((0, other), (1, one)):
            data = call.operand(feature)
            assert data is not None
            if _broadcasts(_unexpanded(gate), data) and (layers := _layers(gate)) is not None:
                found.append(Gate(call, feature, tuple(layers)))
                break
    return found


def _unexpanded(gate: Value) -> Value:
    """Return what ``gate.expand_as(feature)`` expands."""
    while gate.producer is not None and gate.producer.kind in ("expand", "expand_as"):
        source = gate.producer.operand(0)
        if source is None:
            break
        gate = source
    return gate


def _broadcasts(gate: Value, feature: Value) -> bool:
    if len(gate.shape) != len(feature.shape) or gate.shape == feature.shape:
        return False
    return all(g in (1, f) for g, f in zip(gate.shape, feature.shape, strict=True))


def _layers(gate: Value) -> list[Call] | None:
    """Return the weighted calls from the gate back to spatial averages; None if a way does not end in one."""
    layers: list[Call] = []
    open_values, seen = [gate], {gate}
    while open_values:
        value = open_values.pop()
        call = value.producer
        if call is None:
            return None
        if call.role is Role.AVERAGE:
            continue
        if call.role is Role.WEIGHTED:
            layers.append(call)
        for operand in call.operands:
            if operand is not None and operand.is_activation and operand not in seen:
                seen.add(operand)
                open_values.append(operand)
        if len(seen) > _LONGEST:
            return None
    return layers


_LONGEST = 64
"""More values than any gate has; beyond it the walk has left the gate."""
