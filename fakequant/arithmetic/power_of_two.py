"""Scales that are powers of two: a shift in place of a multiplication."""

import torch
from torch import Tensor

from fakequant.arithmetic.ranges import DEAD_AMAX, DEAD_SCALE


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent in float32, exact (``torch.pow`` is not), for integers from -126 to 127.

    >>> power_of_two(torch.tensor([-2, 0, 10]))
    tensor([2.5000e-01, 1.0000e+00, 1.0240e+03])
    """
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def power_of_two_scale(amax: Tensor, num_bits: int, unsigned: bool = False) -> Tensor:
    """Return ``2**ceil(log2(amax / 2**(num_bits - 1)))``, ``2**num_bits`` when unsigned; shaped like amax.

    Source: Jain et al. 2020, "Trained Quantization Thresholds" (arXiv:1903.08066), section 3.2. An amax
    that is a power of two itself becomes the code after the highest one, and is clamped to that.
    A dead range gets DEAD_SCALE, NaN and Inf stay what they are, as in ``scale_from_amax``.

    >>> power_of_two_scale(torch.tensor([1.0, 1.01, 0.0]), 8)
    tensor([7.8125e-03, 1.5625e-02, 6.1035e-05])
    """
    amax = amax.detach().to(torch.float32)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, 0.5 <= mantissa < 1
    rounded_up = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = power_of_two((rounded_up - num_bits + (not unsigned)).clamp(-126, 127))
    scale = torch.where(amax <= DEAD_AMAX, DEAD_SCALE, scale)
    return torch.where(amax.isfinite(), scale, amax)
