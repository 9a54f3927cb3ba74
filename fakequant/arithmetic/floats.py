"""Float grids: the 8-bit and 4-bit formats."""

import torch
from torch import Tensor

from fakequant.descriptor_fields import FLOAT_FORMATS

FP8_E4M3_MAX = FLOAT_FORMATS[4, 3].max
"""Largest finite value of float8 e4m3fn."""


def quantize_float(x: Tensor, scale: Tensor, num_bits: tuple[int, int]) -> Tensor:
    """Return x rounded to a float format times scale, in float32, saturating; ties go to the even code.

    Args:
        x: data of any shape and float dtype; NaN stays NaN.
        scale: float32, positive, broadcasts against x.
        num_bits: one of FLOAT_FORMATS: FP8 E4M3 (float8 e4m3fn), FP8 E5M2, FP4 E2M1 (OCP Microscaling
            Formats v1.0: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).

    >>> quantize_float(torch.tensor([1.8, -1e6]), torch.tensor(1.0), (4, 3))
    tensor([   1.7500, -448.0000])
    >>> quantize_float(torch.tensor([2.4, 5.0, 9.0]), torch.tensor(1.0), (2, 1))
    tensor([2., 4., 6.])
    """
    high, _, dtype = FLOAT_FORMATS[num_bits]
    scaled = x.to(torch.float32).div(scale).clamp_(-high, high)
    rounded = _round_e2m1(scaled) if dtype is None else scaled.to(dtype).to(torch.float32)
    return rounded * scale


def _round_e2m1(x: Tensor) -> Tensor:
    """Round to FP4; torch has a dtype for it, but no conversion. A step is 0.5 below 2, 1 below 4, 2 from there."""
    magnitude = x.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return (x / step).round_().mul_(step)
