"""Weights of few bits through tanh."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.arithmetic import Codes
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import straight_through
from fakequant.schemes.scheme import Scheme, register_scheme, values_in


@register_scheme("dorefa")
class DoReFaWeights(Scheme):
    """Weights of 1 to 8 bits (Zhou et al. 2016, arXiv:1606.06160), see ``arithmetic.dorefa_codes``.

    The gradient passes straight through the rounding, and exactly through tanh and its maximum, as
    in the authors' code; with one bit it passes unchanged.

    >>> import torch
    >>> DoReFaWeights().fake_quantize(torch.tensor([-1.0, 0.3, 1.0]), QuantDescriptor(2, scheme="dorefa"))
    tensor([-1.0000,  0.3333,  1.0000])
    """

    weights_only = True
    num_bits = range(1, 9)
    takes_axis = False

    def bounds(self, descriptor: QuantDescriptor) -> tuple[int, int]:
        """See ``Scheme.bounds``."""
        high = 2 ** _bits(descriptor) - 1
        return -high, high

    def codes(self, x: Tensor, descriptor: QuantDescriptor) -> Codes:
        """Return an odd number for each weight; -1 or 1 with one bit."""
        num_bits = _bits(descriptor)
        return arithmetic.dorefa_codes(arithmetic.dorefa_squashed(x.detach(), num_bits), num_bits)

    def fake_quantize(self, x: Tensor, descriptor: QuantDescriptor) -> Tensor:
        """Return the weights in [-1, 1], with the paper's gradient."""
        num_bits = _bits(descriptor)
        squashed = arithmetic.dorefa_squashed(x, num_bits)
        value = values_in(arithmetic.dorefa_codes(squashed, num_bits), x.dtype)
        return straight_through(squashed.to(x.dtype), value)


def _bits(descriptor: QuantDescriptor) -> int:
    assert isinstance(descriptor.num_bits, int)  # see Scheme.check
    return descriptor.num_bits
