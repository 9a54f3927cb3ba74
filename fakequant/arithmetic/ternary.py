"""Ternary grids: -scale, 0 and +scale.

Li, Zhang and Liu 2016, "Ternary Weight Networks" (arXiv:1605.04711), section 2.2: for weights that
are uniform or normal the ternary tensor closest to w has about the threshold ``0.7 * mean |w|``;
the best scale is the mean of ``|w|`` beyond the threshold, whatever the distribution.
"""

import torch
from torch import Tensor

from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.means import mean_magnitude
from fakequant.arithmetic.ranges import DEAD_AMAX, Axis, scale_from_amax

_THRESHOLD = 0.7


def ternary_codes(w: Tensor, axis: Axis = None) -> Codes:
    """Return the codes -1, 0 and 1 of w, and the scale of each kept index; see ``kept_shape``.

    >>> ternary_codes(torch.tensor([1.5, -2.5, 0.3, 0.0]))
    Codes(codes=tensor([ 1., -1.,  0.,  0.]), scale=tensor(2.), zero_point=None)
    """
    threshold = (_THRESHOLD * mean_magnitude(w, axis)).clamp(min=DEAD_AMAX)
    w = w.detach().to(torch.float32)
    beyond = w.abs() > threshold
    scale = scale_from_amax(mean_magnitude(w, axis, where=beyond), 1)
    return Codes(w.sign() * beyond, scale, None)
