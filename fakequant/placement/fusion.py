"""What an engine fuses into a convolution, seen from the tensor that comes out."""

from collections.abc import Collection

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value
from fakequant.placement.groups import preserves_scale


def is_convolution(call: Call) -> bool:
    """Whether a call is a convolution, transposed or not."""
    return call.role is Role.WEIGHTED and call.kind.startswith("conv")


def fused_convolution(value: Value, readers: int = 1) -> Call | None:
    """Return the convolution that a value comes out of, with only what engines fuse between: norm, activation.

    Args:
        value: the tensor.
        readers: how many calls may read the value itself; anything between has one reader.
    """
    if len(value.uses) > readers or value.is_output:
        return None
    while value.producer is not None:
        call = value.producer
        if is_convolution(call):
            return call
        source = activated_by(call)
        if source is None:
            return None
        if len({reader for reader, _ in source.uses} - {call}) > (1 if call.role is Role.MULTIPLY else 0):
            return None
        value = source
    return None


def activated_by(call: Call) -> Value | None:
    """Return what a fused pointwise call is applied to, also for ``x * sigmoid(x)``; None for any other call."""
    if call.role in (Role.POINTWISE, Role.IDENTITY):
        return call.operand(0)
    if call.role is Role.MULTIPLY and call.kind == "mul":
        for gate, data in ((call.operand(0), call.operand(1)), (call.operand(1), call.operand(0))):
            if gate is None or data is None or gate.producer is None:
                continue
            if gate.producer.role is Role.POINTWISE and gate.producer.operand(0) is data:
                return data
    return None


def distances(graph: TensorGraph, value: Value) -> dict[Value, int]:
    """Return every value that value is computed from, with the longest way to it in calls."""
    found = {value: 0}
    for call in reversed(graph.calls):
        ahead = [found[output] for output in call.outputs if output in found]
        if not ahead:
            continue
        for operand in call.operands:
            if operand is not None and operand.is_activation:
                found[operand] = max(found.get(operand, 0), max(ahead) + 1)
    return found


def only_readers(value: Value, quantized: Collection[tuple[Call, int]]) -> bool:
    """Whether every reader of a value reads it quantized, directly or behind calls that only move elements."""
    if value.is_output or not value.uses:
        return False
    for call, operand in value.uses:
        if (call, operand) in quantized:
            continue
        if preserves_scale(call) and all(only_readers(out, quantized) for out in call.outputs):
            continue
        return False
    return True
