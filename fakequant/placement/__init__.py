"""Which edges of the tensor graph carry a quantizer, and which share one, for each target."""

import dataclasses
from collections.abc import Callable

from fakequant.call_sites import TensorGraph
from fakequant.placement import layers_only, onnxruntime, tensorrt
from fakequant.placement.decision import Decision, Override, Overrides
from fakequant.placement.groups import Groups
from fakequant.placement.layers import is_layer, layer_positions
from fakequant.placement.signs import never_negative
from fakequant.targets import placement_of

__all__ = [
    "Decision",
    "Groups",
    "Override",
    "is_layer",
    "layer_positions",
    "never_negative",
    "place",
    "takes_unsigned",
    "targets",
]


@dataclasses.dataclass(frozen=True)
class _Placement:
    place: Callable[[TensorGraph, Overrides], list[Decision]]
    takes_unsigned: bool
    """Whether codes of tensors that are never negative start at 0."""


_PLACEMENTS = {
    "tensorrt": _Placement(tensorrt.place, takes_unsigned=False),
    "onnxruntime": _Placement(onnxruntime.place, takes_unsigned=True),
}


def targets() -> tuple[str, ...]:
    """Return every target that a model is placed for; the others have the placement of one of these."""
    return tuple(_PLACEMENTS)


def takes_unsigned(target: str) -> bool:
    """Whether a target wants codes from 0 for tensors that are never negative."""
    return _PLACEMENTS[target].takes_unsigned


def place(graph: TensorGraph, target: str, overrides: Overrides, *, on_layers_only: bool = False) -> list[Decision]:
    """Return the decisions for a target, in order of execution.

    Args:
        graph: of the example forward.
        target: for which runtime.
        overrides: what rules and the model say.
        on_layers_only: not what the target fuses, but the layers alone; see ``layers_only``.

    Raises:
        InvalidValueError: unknown target.
    """
    placement = _PLACEMENTS[placement_of(target)]
    return (layers_only.place if on_layers_only else placement.place)(graph, overrides)
