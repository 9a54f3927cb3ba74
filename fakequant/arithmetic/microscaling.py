"""Scales of blocks that are stored in 8 bits themselves: MX (E8M0) and NVFP4 (E4M3).

E8M0 is from the OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6.3: a block of
32 elements shares the scale ``2**(floor(log2(block_amax)) - largest_exponent)``, where the largest
exponent is that of the largest power of two among the elements' values: 8 for FP8 E4M3, 15 for
FP8 E5M2, 2 for FP4 E2M1. The mantissa of block_amax does not matter, so the largest values of a
block may saturate: with E4M3 those above 448 / 512 of the next power of two.

MXINT8 elements are fixed-point numbers with 6 bits behind the point, ``code / 64`` with codes -128
to 127, so their largest exponent is 0. As an integer grid their scale is that of the
specification divided by 64, which is to say that the largest exponent of the codes is 6.

NVFP4 has blocks of 16 FP4 elements whose scales are E4M3 numbers times one float32 of the tensor::

    tensor = tensor_amax / (448 * 6)
    block  = e4m3(block_amax / 6 / tensor)
    value  = element * block * tensor

Source: NVIDIA TensorRT, documentation of quantized types, double quantization of FP4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fakequant.arithmetic.floats import FP8_E4M3_MAX, quantize_float
from fakequant.arithmetic.power_of_two import power_of_two
from fakequant.arithmetic.ranges import DEAD_AMAX, DEAD_SCALE, scale_from_amax
from fakequant.descriptor_fields import FLOAT_FORMATS

_LEAST_E4M3 = 2.0**-9
"""The smallest positive value of float8 e4m3fn."""


class Nvfp4Scales(NamedTuple):
    """The two scales of an NVFP4 tensor.

    Attributes:
        block: E4M3 numbers as float32, positive, one a block.
        tensor: float32, positive.
    """

    block: Tensor
    tensor: Tensor

    @property
    def scale(self) -> Tensor:
        """The scale of each block's elements, float32."""
        return self.block * self.tensor


def e8m0_scale(block_amax: Tensor, largest_exponent: int) -> Tensor:
    """Return ``2**(floor(log2(block_amax)) - largest_exponent)`` in float32, shaped like block_amax.

    Args:
        block_amax: largest magnitude of each block. A dead one gets DEAD_SCALE, which E8M0 holds;
            NaN, which E8M0 has too, stays NaN; Inf counts as the largest number.
        largest_exponent: of the elements: 8 for FP8 E4M3, 15 for FP8 E5M2, 2 for FP4 E2M1,
            ``num_bits - 2`` for integers.

    >>> e8m0_scale(torch.tensor([1.9, 2.0, 448.0, 0.0]), 8)
    tensor([3.9062e-03, 7.8125e-03, 1.0000e+00, 6.1035e-05])
    """
    amax = block_amax.detach().to(torch.float32).clamp(max=torch.finfo(torch.float32).max)
    # A range that is not dead is above 2**-24, so no exponent reaches the end of E8M0, -127.
    exponent = torch.frexp(amax).exponent - 1 - largest_exponent
    scale = torch.where(amax <= DEAD_AMAX, DEAD_SCALE, power_of_two(exponent))
    return torch.where(amax.isnan(), amax, scale)


def nvfp4_scales(block_amax: Tensor, tensor_amax: Tensor) -> Nvfp4Scales:
    """Return the scales of the blocks, shaped like block_amax, and of the tensor, shaped like tensor_amax.

    A block too small for E4M3, or all zero, gets its smallest positive number.

    >>> nvfp4_scales(torch.tensor([6.0, 2.95, 0.0]), torch.tensor(2688.0))
    Nvfp4Scales(block=tensor([1.0000, 0.5000, 0.0020]), tensor=tensor(1.))
    """
    high = FLOAT_FORMATS[2, 1].max
    tensor = scale_from_amax(tensor_amax, FP8_E4M3_MAX * high)
    wanted = block_amax.detach().to(torch.float32) / high / tensor
    return Nvfp4Scales(quantize_float(wanted, torch.ones_like(tensor), (4, 3)).clamp_(min=_LEAST_E4M3), tensor)
