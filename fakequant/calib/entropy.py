"""Entropy: the range that loses the least information (TensorRT's KL calibration).

Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017; ties and bin 0 as in NVIDIA
pytorch-quantization, calib/histogram.py. A candidate keeps the first i bins. With h the
counts, N their sum, O = h[i:].sum() and L levels::

    P = h[:i], with O added to its last bin
    Q = h[:i], bin j in group floor(j * L / i); the sum S of a group spread over its n bins
        that are not empty, so each of them holds S / n; an empty bin stays 0
    KL(P || Q) = sum over k of p[k] * log(p[k] / q[k]),   p = P / N,   q = Q / (N - O)

Only sums over ranges of bins are in it, since all bins of a group share one q::

    N * KL = sum_k P[k] log P[k] - sum_g S log(S / n) - O log(S / n of the last group) + N log((N - O) / N)

With prefix sums of h, of (h > 0) and of h log h a candidate costs L look-ups, and nothing
loops over candidates. KL is infinite where the last bin is empty and O is not. Bin 0,
which has the zeros that ReLU makes, counts as much as bin 1. The last minimum wins. That
matters for data of few different values: keeping the smallest of two alone has P = Q too.
"""

import math

import torch
from torch import Tensor

from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.magnitudes import magnitudes
from fakequant.calib.methods import search_method
from fakequant.descriptor import QuantDescriptor

_CHUNK = 2**16  # look-ups at a time: temporaries stay in the cache

_ROUNDING = 1e-12
"""Divergences this close (relative) are equal: what differs is the rounding of sums over 4096 bins."""


def entropy(histogram: Histogram, levels: int) -> Tensor:
    """Return the amax with the least KL divergence between the values and their quantized form.

    Args:
        histogram: of [rows].
        levels: 128 for signed int8, 256 for unsigned.

    Returns:
        float32 [rows]; the exact maximum for a row with fewer used bins than levels.

    >>> normal = torch.special.ndtri(torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64))
    >>> entropy(Histogram.of(torch.cat([normal, torch.tensor([30.0])])), levels=128).round(decimals=1)
    tensor([4.4000])
    """
    numbers = torch.arange(1, BINS + 1, device=histogram.counts.device)
    used = (numbers * (histogram.counts > 0)).amax(1)
    candidates = numbers[levels - 1 : int(used.max()) if len(used) else 0]
    if len(candidates) == 0:
        return histogram.amax
    counts = histogram.counts.clone()
    counts[:, 0] = counts[:, 1]
    divergence = _divergences(counts.t().to(torch.float64), candidates, levels)
    divergence = divergence.where(candidates.unsqueeze(1) <= used, math.inf)
    least = divergence.amin(0)
    tied = divergence <= least + least.abs() * _ROUNDING
    # A row with fewer used bins than levels has infinity everywhere: its last candidate is its maximum or beyond.
    best = (candidates.unsqueeze(1) * tied).amax(0)
    edge = (best * histogram.width).to(torch.float32)
    return torch.minimum(edge, histogram.amax)


def _divergences(counts: Tensor, candidates: Tensor, levels: int) -> Tensor:
    """Return N * (KL + log N) of every candidate: float64 [candidates, rows] from float64 counts [BINS, rows]."""
    kept, filled, information = _prefix(counts), _prefix((counts > 0).double()), _prefix(torch.xlogy(counts, counts))
    total = kept[-1]
    groups = torch.arange(levels + 1, device=counts.device)
    result = []
    for i in candidates.split(max(1, _CHUNK // (len(groups) * counts.shape[1]))):
        starts = (groups * i.unsqueeze(1) + levels - 1) // levels  # ceil(g * i / L)
        mass, bins = _between(kept, starts), _between(filled, starts)
        # Counts are integers, so the mean of a group is at least 1, but for an empty group, whose 0 becomes 1.
        log_mean = (mass / bins.clamp_(min=1.0)).clamp_(min=1.0).log_()
        last, outliers = counts[i - 1], total - kept[i]
        clipped = last + outliers
        divergence = information[i - 1] + torch.xlogy(clipped, clipped) + total * kept[i].log()
        divergence -= outliers * log_mean[:, -1] + mass.mul_(log_mean).sum(1)
        result.append(divergence.where((last > 0) | (outliers == 0), math.inf))
    return torch.cat(result)


def _prefix(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... rows: [n + 1, rows] from [n, rows]."""
    return torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])


def _between(prefix: Tensor, starts: Tensor) -> Tensor:
    """Return the sums of each group: [candidates, groups, rows] from group starts [candidates, groups + 1]."""
    # index_select on a flat index takes half the time of prefix[starts].
    return prefix.index_select(0, starts.flatten()).view(*starts.shape, -1).diff(dim=1)


@search_method("entropy", on_floats=False, on_weights=False)
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    return entropy(histogram, levels=len(magnitudes(descriptor)))
