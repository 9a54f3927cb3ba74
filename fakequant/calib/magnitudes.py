"""The magnitudes that a grid can represent, in units of its scale."""

import torch
from torch import Tensor

from fakequant.arithmetic import integer_bounds
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import FLOAT_FORMATS


def magnitudes(descriptor: QuantDescriptor) -> Tensor:
    """Return the non-negative values of a grid with scale 1, float32 [levels], ascending from 0.

    The lowest code of a signed integer grid (-128) has no positive counterpart and is left
    out: histograms hold absolute values, and amax is 127 steps.

    >>> magnitudes(QuantDescriptor(3)), len(magnitudes(QuantDescriptor((4, 3))))
    (tensor([0., 1., 2., 3.]), 127)
    """
    if isinstance(descriptor.num_bits, tuple):
        dtype = FLOAT_FORMATS[descriptor.num_bits].dtype
        if dtype is None:
            return torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        values = torch.arange(128, dtype=torch.uint8).view(dtype).to(torch.float32)
        return values[values.isfinite()]
    _, high = integer_bounds(descriptor.num_bits, descriptor.unsigned)
    return torch.arange(high + 1, dtype=torch.float32)
