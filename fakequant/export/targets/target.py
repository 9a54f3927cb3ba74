"""A target: the opsets it reads and the rewrites that its files get, in order."""

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from fakequant.errors import InvalidValueError


@dataclasses.dataclass(frozen=True)
class Target:
    """What one runtime wants.

    Args:
        name: as given to ``export_onnx(target=...)``.
        default_opset: written unless the caller asks for another.
        rewrites: makes the passes of one export; they run in this order.
    """

    name: str
    default_opset: int
    rewrites: Callable[[], tuple[ir.passes.InPlacePass, ...]]


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Make a target known by its name."""
    _TARGETS[target.name] = target
    return target


def target_named(name: str) -> Target:
    """Return a registered target.

    Raises:
        InvalidValueError: the name is unknown; lists the known ones.
    """
    if name not in _TARGETS:
        raise InvalidValueError(f"target: expected one of {sorted(_TARGETS)}, got {name!r}")
    return _TARGETS[name]
