"""Learned ranges: where training starts, and how far a step goes.

LSQ is Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153), LSQ+ is Bhalgat et
al. 2020 (arXiv:2004.09576). Both train the step s; here the range ``amax = high * s`` stands for it.
LSQ+ starts activations at the least squared error, which is the search method "mse".
"""

import math

import torch
from torch import Tensor

from fakequant.arithmetic.integers import integer_bounds


def lsq_amax(mean_magnitude: Tensor, high: int) -> Tensor:
    """Return the range of ``s = 2 * mean |x| / sqrt(high)``, float32 (LSQ, section 2).

    >>> lsq_amax(torch.tensor(0.5), 4)
    tensor(2.)
    """
    return mean_magnitude.detach().to(torch.float32) * (2 * math.sqrt(high))


def lsq_plus_weight_amax(mean: Tensor, std: Tensor, num_bits: int) -> Tensor:
    """Return the range of ``s = max(|mean - 3 std|, |mean + 3 std|) / 2**(num_bits - 1)`` (LSQ+, on weights).

    >>> lsq_plus_weight_amax(torch.tensor(0.0), torch.tensor(1.0), 2)
    tensor(1.5000)
    """
    mean, std = (v.detach().to(torch.float32) for v in (mean, std))
    _, high = integer_bounds(num_bits)
    return (mean.abs() + 3 * std) * (high / (high + 1))


def lsq_gradient_scale(count: int, high: int) -> float:
    """Return ``1 / sqrt(count * high)``: LSQ's factor on the gradient of a step (LSQ, section 2).

    Args:
        count: weights, or features (elements of one sample), that share the step; 0 counts as 1.
        high: highest code.

    >>> lsq_gradient_scale(100, 4)
    0.05
    """
    return 1 / math.sqrt(max(count, 1) * high)
