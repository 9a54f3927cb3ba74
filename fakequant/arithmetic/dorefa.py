"""DoReFa-Net: weights and gradients of k bits.

Zhou et al. 2016 (arXiv:1606.06160). With ``quantize_k(r) = round((2**k - 1) * r) / (2**k - 1)`` on
[0, 1]:

- weights: ``2 * quantize_k(tanh(w) / (2 * max |tanh(w)|) + 1/2) - 1``; for k = 1 ``mean |w| * sign(w)``;
- gradients: ``2 * m * (quantize_k(g / (2 * m) + 1/2 + noise / (2**k - 1)) - 1/2)`` with m the maximum
  of ``|g|`` over a sample, and noise uniform in [-0.5, 0.5].

Activations, ``quantize_k(clip(x, 0, 1))``, are an unsigned integer grid of amax 1. The clip is the
network's own in the paper; where there is none, the grid's gradient ends half a step beyond 0 and 1.
"""

import torch
from torch import Tensor

from fakequant.arithmetic.binary import scaled_binary_codes
from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.integers import integer_bounds
from fakequant.arithmetic.ranges import DEAD_AMAX
from fakequant.arithmetic.reductions import reduce_amax


def dorefa_squashed(w: Tensor, num_bits: int) -> Tensor:
    """Return what is rounded, with gradient: with one bit w as it is, else ``tanh(w) / max |tanh(w)|`` in float32.

    That is in [-1, 1]; a dead tensor stays as it is.

    >>> dorefa_squashed(torch.tensor([0.0, -1.0, 1.0]), 2)
    tensor([ 0., -1.,  1.])
    """
    if num_bits == 1:
        return w
    bent = w.to(torch.float32).tanh()
    if bent.numel() == 0:
        return bent
    peak = bent.abs().max()
    return bent / torch.where(peak <= DEAD_AMAX, 1.0, peak)


def dorefa_codes(squashed: Tensor, num_bits: int) -> Codes:
    """Return the codes of weights: odd integers from ``-(2**num_bits - 1)`` with scale ``1 / (2**num_bits - 1)``.

    They are ``2 * c - (2**num_bits - 1)`` of the paper's codes c from 0 on. One bit has another scale.

    Args:
        squashed: the weights, ``dorefa_squashed``.
        num_bits: 1 or more.

    >>> dorefa_codes(dorefa_squashed(torch.tensor([-1.0, 0.3, 1.0]), 2), 2).codes
    tensor([-3.,  1.,  3.])
    """
    if num_bits == 1:
        return scaled_binary_codes(squashed)
    _, high = integer_bounds(num_bits, unsigned=True)
    codes = (squashed.detach() / 2 + 0.5).mul_(high).round_()
    return Codes(codes.mul_(2).sub_(high), torch.tensor(1 / high, device=squashed.device), None)


def quantize_gradient(grad: Tensor, num_bits: int, noise: Tensor) -> Tensor:
    """Return a gradient on the grid of ``2**num_bits`` values between plus and minus its sample's maximum.

    Args:
        grad: the first axis counts the samples, each with a range of its own.
        num_bits: 1 or more.
        noise: shaped like grad, between -0.5 and 0.5; rounding errors are then zero on average.

    Returns:
        grad's shape and dtype, computed in float32. A sample of zeros stays zero.

    >>> quantize_gradient(torch.tensor([[1.0, -4.0], [0.1, 0.3]]), 2, torch.zeros(2, 2))
    tensor([[ 1.3333, -4.0000],
            [ 0.1000,  0.3000]])
    """
    _, high = integer_bounds(num_bits, unsigned=True)
    amax = reduce_amax(grad, 0 if grad.ndim else None).to(torch.float32)
    position = grad.to(torch.float32) / (2 * amax.clamp(min=torch.finfo(torch.float32).tiny)) + 0.5
    # Noise beyond the range is cut off, as in the authors' code (tensorpack, DoReFa-Net/dorefa.py).
    codes = (position * high + noise).clamp_(0, high).round_()
    return ((codes * 2 - high) * (amax / high)).to(grad.dtype)
