"""Signs of weights or activations."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.arithmetic import Codes
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import straight_through
from fakequant.schemes.scheme import Scheme, register_scheme, values_in


@register_scheme("bnn")
class BinarySigns(Scheme):
    """+1 from 0 on, else -1 (Courbariaux et al. 2016, arXiv:1602.02830).

    The gradient is that of the hard tanh: it passes where ``|x| <= 1`` (the paper's straight-through estimator).

    >>> import torch
    >>> BinarySigns().fake_quantize(torch.tensor([-0.2, 0.0, 3.0]), QuantDescriptor(1, scheme="bnn"))
    tensor([-1.,  1.,  1.])
    """

    weights_only = False
    num_bits = (1,)
    takes_axis = False

    def bounds(self, descriptor: QuantDescriptor) -> tuple[int, int]:
        """See ``Scheme.bounds``."""
        return -1, 1

    def codes(self, x: Tensor, descriptor: QuantDescriptor) -> Codes:
        """Return -1 or 1 for each element, with scale 1."""
        return arithmetic.binary_codes(x)

    def fake_quantize(self, x: Tensor, descriptor: QuantDescriptor) -> Tensor:
        """Return the signs, with the gradient of the hard tanh."""
        return straight_through(x, values_in(self.codes(x, descriptor), x.dtype), x.detach().abs() <= 1)
