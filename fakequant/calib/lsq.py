"""LSQ: the range where training a step size by LSQ starts.

Esser et al. 2020 (arXiv:1902.08153): ``s = 2 * mean |x| / sqrt(high)``, so ``amax = high * s``. The
formula is for few bits: with 8 it is far beyond any value, which would only make steps coarser,
so it is cut at the exact maximum, as every method here is.
"""

import torch
from torch import Tensor

from fakequant.arithmetic import bounds_of, lsq_amax
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.methods import search_method
from fakequant.descriptor import QuantDescriptor


def mean_magnitude(histogram: Histogram) -> Tensor:
    """Return the mean of ``|x|``, float64 [rows], each value taken at the centre of its bin; 0 without data.

    >>> mean_magnitude(Histogram.of(torch.arange(0.0, 5.0)))
    tensor([2.0005], dtype=torch.float64)
    """
    twice = torch.arange(1, 2 * BINS, 2, device=histogram.counts.device)  # 2 * centre, an integer: the sum is exact
    mean = (histogram.counts * twice).sum(1) / 2 / histogram.count * histogram.width
    return mean.where(histogram.amax > 0, 0.0)


@search_method("lsq", fp8=False)
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    _, high = bounds_of(descriptor)
    return torch.minimum(lsq_amax(mean_magnitude(histogram), high), histogram.amax)
