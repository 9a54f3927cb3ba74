"""Exact minimum and maximum of the finite values of a tensor; NaN and Inf are counted beside it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fakequant.arithmetic import Axis, extremes, kept_shape
from fakequant.errors import InvalidTypeError

_REDUCIBLE = (torch.float32, torch.float16, torch.bfloat16)


class Extremes(NamedTuple):
    """What ``finite_extremes`` found.

    Attributes:
        minimum: float32, shaped as ``arithmetic.kept_shape`` says; +inf where no value is finite.
        maximum: the same; -inf where no value is finite.
        num_nan: NaN in the whole tensor.
        num_inf: +Inf and -Inf in the whole tensor.
    """

    minimum: Tensor
    maximum: Tensor
    num_nan: int
    num_inf: int

    @property
    def amax(self) -> Tensor:
        """The largest magnitude of each kept index; 0 where no value is finite."""
        return torch.maximum(-self.minimum, self.maximum).clamp(min=0.0)

    @classmethod
    def none(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> "Extremes":
        """Return the extremes of no data."""
        nothing = torch.full(shape, math.inf, device=device)
        return cls(nothing, -nothing, 0, 0)

    @classmethod
    def from_outward(cls, outward: Tensor, shape: tuple[int, ...], num_nan: int, num_inf: int) -> "Extremes":
        """Return the extremes that have this ``outward``."""
        low, high = (end.reshape(shape) for end in outward.chunk(2))
        return cls(-low, high, num_nan, num_inf)

    @property
    def outward(self) -> Tensor:
        """What only grows with more data: -minimum, then maximum, flat."""
        return torch.cat([-self.minimum.flatten(), self.maximum.flatten()])

    def merge(self, other: "Extremes") -> "Extremes":
        """Return the extremes of the data of both."""
        return Extremes(
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.num_nan + other.num_nan,
            self.num_inf + other.num_inf,
        )


def finite_extremes(x: Tensor, axis: Axis = None) -> Extremes:
    """Return the smallest and largest finite value of each kept index of x.

    Args:
        x: any real tensor on any device; it may be empty.
        axis: axis or axes that keep their own extremes; None for the whole tensor.

    Raises:
        InvalidTypeError: x is complex.

    >>> finite_extremes(torch.tensor([[1.0, -3.0], [torch.nan, 2.0]]), axis=0)
    Extremes(minimum=tensor([[-3.],
            [ 2.]]), maximum=tensor([[1.],
            [2.]]), num_nan=1, num_inf=0)
    """
    x = as_reducible(x)
    shape = kept_shape(x.shape, axis)
    if x.numel() == 0:
        return Extremes.none(shape, x.device)
    low, high = extremes(x, axis)
    num_nan = num_inf = 0
    # NaN and Inf both reach the result (and make NaN here), so x is only looked through when it may hold some.
    if not bool(((high - low) * 0 == 0).all()):
        num_nan, num_inf = int(x.isnan().sum()), int(x.isinf().sum())
        finite = x.isfinite()
        low = extremes(x.where(finite, math.inf), axis)[0]
        high = extremes(x.where(finite, -math.inf), axis)[1]
    # Adding 0 turns -0.0 into 0.0: which of the two a reduction returns depends on the order.
    minimum, maximum = (bound.to(torch.float32) + 0.0 for bound in (low, high))
    return Extremes(minimum, maximum, num_nan, num_inf)


def as_reducible(x: Tensor) -> Tensor:
    """Return x, without gradient, in a dtype that keeps its float32 value and that torch reduces on every device."""
    if x.is_complex():
        raise InvalidTypeError(f"x: expected a real tensor, got {x.dtype}")
    x = x.detach()
    return x if x.dtype in _REDUCIBLE else x.to(torch.float32)
