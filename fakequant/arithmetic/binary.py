"""Binary grids: two values, +scale and -scale.

``sign(0) = +1``, as in the deterministic binarization of Courbariaux et al. 2016, "Binarized Neural
Networks" (arXiv:1602.02830). The scale is 1 there. Rastegari et al. 2016, "XNOR-Net"
(arXiv:1603.05279): of all ``alpha * sign(w)`` the closest to w has ``alpha = mean |w|``.
"""

import torch
from torch import Tensor

from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.means import mean_magnitude
from fakequant.arithmetic.ranges import Axis, scale_from_amax


def binary_codes(x: Tensor) -> Codes:
    """Return the signs of x with scale 1; NaN stays NaN.

    >>> binary_codes(torch.tensor([-0.2, 0.0, 3.0])).codes
    tensor([-1.,  1.,  1.])
    """
    x = x.detach().to(torch.float32)
    signs = torch.where(x >= 0, 1.0, -1.0)
    return Codes(signs.where(~x.isnan(), x), torch.ones((), device=x.device), None)


def scaled_binary_codes(x: Tensor, axis: Axis = None) -> Codes:
    """Return the signs of x with the scale mean ``|x|``, one for each kept index; see ``kept_shape``.

    >>> scaled_binary_codes(torch.tensor([[1.0, -3.0], [0.0, 5.0]]), axis=0)
    Codes(codes=tensor([[ 1., -1.],
            [ 1.,  1.]]), scale=tensor([[2.0000],
            [2.5000]]), zero_point=None)
    """
    return binary_codes(x)._replace(scale=scale_from_amax(mean_magnitude(x, axis), 1))
