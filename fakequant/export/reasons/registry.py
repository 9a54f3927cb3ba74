"""The reasons, each one function registered for its op types."""

from collections.abc import Callable

import onnx_ir as ir

Reason = Callable[[ir.Node], str | None]

_REASONS: list[tuple[frozenset[str], Reason]] = []


def reason(*op_types: str) -> Callable[[Reason], Reason]:
    """Register a function that returns a sentence where it holds for a node of these types, else None."""

    def register(function: Reason) -> Reason:
        _REASONS.append((frozenset(op_types), function))
        return function

    return register


def reasons_for(node: ir.Node) -> tuple[str, ...]:
    """Return every known reason why an op has no integer kernel; to repair one of several is not enough.

    Args:
        node: of the graph as written, with its shapes inferred.
    """
    found = (function(node) for op_types, function in _REASONS if node.op_type in op_types)
    return tuple(text for text in found if text is not None)
