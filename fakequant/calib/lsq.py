"""LSQ: the range where training a step size by LSQ starts.

Esser et al. 2020 (arXiv:1902.08153): ``s = 2 * mean |x| / sqrt(high)``, so ``amax = high * s``. It may lie
beyond the exact maximum, with 8 bits far beyond: training takes it from there.
"""

import torch
from torch import Tensor

from fakequant.arithmetic import bounds_of, lsq_amax
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.methods import search_method
from fakequant.descriptor import QuantDescriptor


def lsq(histogram: Histogram, high: int) -> Tensor:
    """Return the range of LSQ's first step size, each value taken at the centre of its bin.

    Args:
        histogram: of [rows].
        high: highest code: 7 for signed int4.

    Returns:
        float32 [rows]; 0 for a row without data.

    >>> squares = Histogram.of(torch.linspace(0, 1, 10_001) ** 2)
    >>> lsq(squares, high=1).round(decimals=2), lsq(squares, high=7).round(decimals=2)
    (tensor([0.6700]), tensor([1.7600]))
    """
    twice = torch.arange(1, 2 * BINS, 2, device=histogram.counts.device)  # 2 * centre, an integer: the sum is exact
    mean = (histogram.counts * twice).sum(1) / 2 / histogram.count * histogram.width
    return lsq_amax(mean.where(histogram.amax > 0, 0.0), high)


@search_method("lsq", on_floats=False)
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    _, high = bounds_of(descriptor)
    return lsq(histogram, high)
