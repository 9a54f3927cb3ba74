"""Affine integer grids: a range that need not be symmetric, as scale and integer zero point.

::

    scale      = (amax - amin) / (high - low)
    zero_point = clamp(round_half_even(low - amin / scale), low, high)
    code       = clamp(round_half_even(x / scale) + zero_point, low, high)
    value      = (code - zero_point) * scale

with amin <= 0 <= amax, so that 0 is a value of the grid (Jacob et al. 2018, arXiv:1712.05877,
section 3). On codes 0 to 255 these are the formulas of ONNX DynamicQuantizeLinear.
"""

import torch
from torch import Tensor

from fakequant.arithmetic.ranges import DEAD_AMAX, DEAD_SCALE


def affine_parameters(amin: Tensor, amax: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, both float32 and shaped like the range.

    A range that is dead (see DEAD_AMAX) gets DEAD_SCALE.

    >>> affine_parameters(torch.tensor(-1.0), torch.tensor(4.0), 0, 255)
    (tensor(0.0196), tensor(51.))
    """
    amin, amax = (bound.detach().to(torch.float32) for bound in (amin, amax))
    span = amax - amin
    scale = torch.where(span <= DEAD_AMAX, DEAD_SCALE, span / (high - low))
    return scale, (low - amin / scale).round_().clamp_(low, high)


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Return the codes of x as float32 integers; scale and zero point broadcast against x.

    >>> quantize_affine(torch.tensor([-9.0, 0.0, 1.0]), torch.tensor(0.5), torch.tensor(10.0), 0, 255)
    tensor([ 0., 10., 12.])
    """
    return x.to(torch.float32).div(scale).round_().add_(zero_point).clamp_(low, high)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values of codes in float32.

    >>> dequantize_affine(torch.tensor([0.0, 10.0, 12.0]), torch.tensor(0.5), torch.tensor(10.0))
    tensor([-5.,  0.,  1.])
    """
    return (codes.to(torch.float32) - zero_point) * scale
