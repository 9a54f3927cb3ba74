"""Ranges: amax, its shape, and the scale that it gives."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fakequant.errors import InvalidTypeError, InvalidValueError

DEAD_AMAX = 2.0**-24
"""A range at or below this holds nothing that float16 can tell from zero (its smallest subnormal)."""

DEAD_SCALE = 2.0**-14
"""Scale of a dead range: positive, and the smallest normal number of float16."""


Axis: TypeAlias = int | Sequence[int] | str | None
"""Kept axes; a str means "tokens": all but the last."""


def scale_from_amax(amax: Tensor, bound: float) -> Tensor:
    """Return the step between two codes, ``amax / bound`` in float32, same shape as amax.

    A range that is dead (see DEAD_AMAX) gets DEAD_SCALE, which is positive and survives
    a cast to float16. No scale is ever 0 or subnormal in float32.

    >>> scale_from_amax(torch.tensor([12.7, 0.0]), 127)
    tensor([1.0000e-01, 6.1035e-05])
    """
    amax = amax.detach().to(torch.float32)
    return torch.where(amax <= DEAD_AMAX, DEAD_SCALE, amax / bound)


def kept_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Return the kept axes, counted from the front and sorted; () for per tensor.

    >>> kept_axes((-1, 0), 4), kept_axes("tokens", 3)
    ((0, 3), (0, 1))
    """
    if axis is None:
        return ()
    if isinstance(axis, str):
        return tuple(range(ndim - 1))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise InvalidValueError(f"axis: expected -{ndim} to {ndim - 1} for a tensor of {ndim} dimensions, got {a}")
    positive = sorted(a % ndim for a in axes)
    if len(set(positive)) != len(positive):
        raise InvalidValueError(f"axis: expected different axes, got {axes} for a tensor of {ndim} dimensions")
    return tuple(positive)


def kept_shape(shape: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Return the shape of amax for data of this shape: kept axes keep their size, others become 1.

    >>> kept_shape((8, 3, 5, 5), 0), kept_shape((8, 3, 5, 5), None)
    ((8, 1, 1, 1), ())
    """
    keep = kept_axes(axis, len(shape))
    return tuple(size if i in keep else 1 for i, size in enumerate(shape)) if keep else ()


def check_amax(amax: object) -> Tensor:
    """Return amax as a tensor, or raise if it is no range: not numeric, negative, or not finite in float32."""
    return _checked_end("amax", amax, ">=")


def check_amin(amin: object) -> Tensor:
    """Return amin, the lower end of a range, as a tensor, or raise: not numeric, positive, or not finite."""
    return _checked_end("amin", amin, "<=")


def _checked_end(name: str, end: object, side: str) -> Tensor:
    try:
        # A copy: torch refuses or warns of arrays that are reversed or read-only.
        tensor = torch.as_tensor(np.array(end) if isinstance(end, np.ndarray) else end)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"{name}: expected a number, sequence, array or tensor, got {end!r}") from error
    if tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidValueError(f"{name}: expected one real value or more, got {end!r}")
    is_outside = tensor >= 0 if side == ">=" else tensor <= 0
    if not bool((torch.isfinite(tensor.to(torch.float32)) & is_outside).all()):
        raise InvalidValueError(f"{name}: expected finite values {side} 0, got {end!r}")
    return tensor.detach()
