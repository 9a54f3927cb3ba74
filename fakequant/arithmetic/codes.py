"""Codes: a quantized tensor as the integers and the grid that a file stores."""

from typing import NamedTuple

from torch import Tensor


class Codes(NamedTuple):
    """A tensor as integers on a grid: ``value = (codes - zero_point) * scale``.

    Attributes:
        codes: integers as float32, shaped like the tensor.
        scale: float32, positive; broadcasts against codes, or has ``block_shape``.
        zero_point: integers as float32, shaped like scale; None for zero.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
