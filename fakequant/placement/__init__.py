"""Which edges of the tensor graph carry a quantizer, and which share one, for each target."""

from collections.abc import Callable

from fakequant.call_sites import TensorGraph
from fakequant.errors import InvalidValueError
from fakequant.placement import tensorrt
from fakequant.placement.decision import SOFTMAX, Decision, Override, Overrides
from fakequant.placement.groups import Groups
from fakequant.placement.layers import is_layer, layer_positions

__all__ = [
    "SOFTMAX",
    "Decision",
    "Groups",
    "Override",
    "check_target",
    "is_layer",
    "layer_positions",
    "place",
]

_PLACEMENTS: dict[str, Callable[[TensorGraph, Overrides], list[Decision]]] = {"tensorrt": tensorrt.place}


def check_target(target: str) -> None:
    """Raise InvalidValueError for a target that nothing can be placed for."""
    if target not in _PLACEMENTS:
        raise InvalidValueError(f"target: expected one of {sorted(_PLACEMENTS)}, got {target!r}")


def place(graph: TensorGraph, target: str, overrides: Overrides) -> list[Decision]:
    """Return the decisions for a target, in order of execution.

    Raises:
        InvalidValueError: unknown target.
    """
    check_target(target)
    return _PLACEMENTS[target](graph, overrides)
