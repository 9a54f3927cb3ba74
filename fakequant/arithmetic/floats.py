"""Float grids: the 8-bit formats."""

import torch
from torch import Tensor

FP8_E4M3_MAX = 448.0
"""Largest finite value of float8 e4m3fn."""


def quantize_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Return x rounded to FP8 E4M3 times scale, in float32, saturating at 448 * scale.

    >>> quantize_e4m3(torch.tensor([1.8, 1e6]), torch.tensor(1.0))
    tensor([  1.7500, 448.0000])
    """
    scaled = x.to(torch.float32).div(scale).clamp_(-FP8_E4M3_MAX, FP8_E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).to(torch.float32) * scale
