"""Signs of weights, times their mean magnitude."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.arithmetic import Codes
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import straight_through
from fakequant.schemes.scheme import Scheme, register_scheme, values_in


@register_scheme("xnor")
class ScaledBinaryWeights(Scheme):
    """Weights of ``alpha * sign(w)``, alpha the mean of ``|w|`` (Rastegari et al. 2016, arXiv:1603.05279).

    The paper has one alpha a filter, which is ``axis=0`` for a convolution. With n the number of
    weights that share an alpha, the gradient of the binary weights reaches the float ones times
    ``1 / n + alpha * (|w| <= 1)`` (section 3.1, "Training Binary-Weights-Networks").

    >>> import torch
    >>> ScaledBinaryWeights().fake_quantize(torch.tensor([-0.5, 0.0, 2.5]), QuantDescriptor(1, scheme="xnor"))
    tensor([-1.,  1.,  1.])
    """

    weights_only = True
    num_bits = (1,)
    takes_axis = True

    def bounds(self, descriptor: QuantDescriptor) -> tuple[int, int]:
        """See ``Scheme.bounds``."""
        return -1, 1

    def codes(self, x: Tensor, descriptor: QuantDescriptor) -> Codes:
        """Return -1 or 1 for each weight."""
        return arithmetic.scaled_binary_codes(x, descriptor.axis)

    def fake_quantize(self, x: Tensor, descriptor: QuantDescriptor) -> Tensor:
        """Return the binary weights, with the paper's gradient."""
        codes = self.codes(x, descriptor)
        sharing = max(x.numel(), 1) / max(codes.scale.numel(), 1)
        factor = 1 / sharing + codes.scale * (x.detach().abs() <= 1)
        return straight_through(x, values_in(codes, x.dtype), factor)
