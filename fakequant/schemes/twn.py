"""Ternary weights."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.arithmetic import Codes
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import straight_through
from fakequant.schemes.scheme import Scheme, register_scheme, values_in


@register_scheme("twn")
class TernaryWeights(Scheme):
    """Weights of -scale, 0 and +scale (Li, Zhang and Liu 2016, arXiv:1605.04711), see ``arithmetic.ternary_codes``.

    The float weights get the gradient of the ternary ones unchanged (section 2.3).

    >>> import torch
    >>> TernaryWeights().fake_quantize(torch.tensor([1.5, -2.5, 0.3, 0.0]), QuantDescriptor(2, scheme="twn"))
    tensor([ 2., -2.,  0.,  0.])
    """

    weights_only = True
    num_bits = (2,)
    takes_axis = True

    def bounds(self, descriptor: QuantDescriptor) -> tuple[int, int]:
        """See ``Scheme.bounds``."""
        return -1, 1

    def codes(self, x: Tensor, descriptor: QuantDescriptor) -> Codes:
        """Return -1, 0 or 1 for each weight."""
        return arithmetic.ternary_codes(x, descriptor.axis)

    def fake_quantize(self, x: Tensor, descriptor: QuantDescriptor) -> Tensor:
        """Return the ternary weights, with the gradient passed on."""
        return straight_through(x, values_in(self.codes(x, descriptor), x.dtype))
