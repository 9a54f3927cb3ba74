"""The magnitudes that a grid can represent, in units of its scale."""

import torch
from torch import Tensor

from fakequant.arithmetic import integer_bounds
from fakequant.descriptor import QuantDescriptor


def magnitudes(descriptor: QuantDescriptor) -> Tensor:
    """Return the non-negative values of a grid with scale 1, float32 [levels], ascending from 0.

    The lowest code of a signed integer grid (-128) has no positive counterpart and is left
    out: histograms hold absolute values, and amax is 127 steps.

    >>> magnitudes(QuantDescriptor(3)), len(magnitudes(QuantDescriptor((4, 3))))
    (tensor([0., 1., 2., 3.]), 127)
    """
    if isinstance(descriptor.num_bits, tuple):
        # The bytes of float8 e4m3fn from 0 to 448; the next one, 0x7F, is NaN.
        return torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    _, high = integer_bounds(descriptor.num_bits, descriptor.unsigned)
    return torch.arange(high + 1, dtype=torch.float32)
