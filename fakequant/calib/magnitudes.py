"""The magnitudes that a grid can represent, in units of its scale."""

import torch
from torch import Tensor

from fakequant.arithmetic import integer_bounds
from fakequant.descriptor import QuantDescriptor

_BYTES = {(4, 3): (0x7F, torch.float8_e4m3fn), (5, 2): (0x7C, torch.float8_e5m2)}
"""The first byte behind the largest finite number: NaN in float8 e4m3fn, infinity in float8 e5m2."""


def magnitudes(descriptor: QuantDescriptor) -> Tensor:
    """Return the non-negative values of a grid with scale 1, float32 [levels], ascending from 0.

    The lowest code of a signed integer grid (-128) has no positive counterpart and is left
    out: histograms hold absolute values, and amax is 127 steps.

    >>> magnitudes(QuantDescriptor(3)), len(magnitudes(QuantDescriptor((4, 3))))
    (tensor([0., 1., 2., 3.]), 127)
    """
    if descriptor.num_bits == (2, 1):
        return torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    if isinstance(descriptor.num_bits, tuple):
        beyond, dtype = _BYTES[descriptor.num_bits]
        return torch.arange(beyond, dtype=torch.uint8).view(dtype).to(torch.float32)
    _, high = integer_bounds(descriptor.num_bits, descriptor.unsigned)
    return torch.arange(high + 1, dtype=torch.float32)
