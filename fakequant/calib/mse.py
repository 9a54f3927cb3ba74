"""MSE: the range with the least mean squared quantization error.

Everything is in units of the bin width, and a value counts as the centre x of its bin.
With magnitudes 0 = m[0] < ... < m[L-1] = high, a candidate of i bins has scale i / high and
represents v[j] = m[j] * i / high; values beyond i clip to the last. As a value passes the
middle between v[j-1] and v[j], its error (x - v)**2 changes from one parabola to the next,
and the two differ by a line::

    (x - v[j])**2 - (x - v[j-1])**2 = -2 * (v[j] - v[j-1]) * (x - middle[j])

So, with T0(t) and T1(t) the sums of counts and of counts * x over all x >= t,

    error(i) = sum counts * x**2 - 2 * sum over j >= 1 of (v[j] - v[j-1]) * (T1(middle[j]) - middle[j] * T0(middle[j]))

is exact, costs two look-ups a level and a candidate, and needs no rule for ties: at a
middle both codes are equally far. Candidates are the upper edges of all bins from the
first, up to the exact maximum, and the exact maximum; the first minimum wins.

A grid with more levels than there are bins (13 bits and more) has steps that the bins do
not show. Its rounding error is taken as scale**2 / 12 a value (uniform over a step: Widrow
and Kollar, "Quantization Noise", 2008), its clipping error from the histogram as above.

The criterion is that of NVIDIA pytorch-quantization, calib/histogram.py, which tries bin
centres from the 128th on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fakequant.arithmetic import grid_parameters, scale_from_amax
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.magnitudes import magnitudes as magnitudes_of
from fakequant.calib.methods import search_method
from fakequant.descriptor import QuantDescriptor

_OCTAVES = 12
"""Powers of two below the maximum that are tried for a scale: down to 1/4096, a bin's width."""

_CHUNK = 2**18  # look-ups at a time: temporaries stay in the cache


def mse(histogram: Histogram, magnitudes: Tensor) -> Tensor:
    """Return the amax with the least mean squared error.

    Args:
        histogram: of [rows].
        magnitudes: [levels], ascending from 0: what the grid represents in units of the scale,
            see ``magnitudes.magnitudes``. Evenly spaced when there are more than BINS.

    Returns:
        float32 [rows]; 0 for a row without data.

    >>> normal = torch.special.ndtri(torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64))
    >>> outlier = torch.cat([normal, torch.tensor([30.0])])
    >>> mse(Histogram.of(outlier), torch.arange(128.0)), mse(Histogram.of(normal), torch.arange(8.0))
    (tensor([14.6328]), tensor([2.4727]))
    """
    magnitudes = magnitudes.to(histogram.counts.device, torch.float64)
    exact = histogram.amax / histogram.width
    whole = exact.floor().to(torch.int64)
    candidates = torch.arange(1, int(whole.max()) + 1 if len(whole) else 1, device=whole.device)
    if len(candidates) == 0:
        return histogram.amax
    if len(magnitudes) > BINS:
        errors, at_maximum = _fine_errors(histogram, candidates, exact, float(magnitudes[-1]))
    else:
        errors = _errors(histogram, candidates, magnitudes)
        at_maximum = _squared_error(histogram, exact / magnitudes[-1], magnitudes)
    errors = errors.where(candidates.unsqueeze(1) <= whole, torch.inf)
    least, best = errors.min(0)
    edge = ((best + 1) * histogram.width).to(torch.float32)
    return edge.where(least <= at_maximum, histogram.amax)


def quantization_error(histogram: Histogram, amax: Tensor, magnitudes: Tensor) -> Tensor:
    """Return the mean squared error that a grid of this range makes.

    Args:
        histogram: of [rows].
        amax: the range of each row, of any shape with ``rows`` elements.
        magnitudes: [levels], as for ``mse``.

    Returns:
        float64 [rows], in squared units of the data; 0 for a row without data, or with zeros only.

    >>> quantization_error(Histogram.of(torch.linspace(0, 1, 100_001)), torch.tensor(1.0), torch.arange(128.0)) * 127**2
    tensor([0.0833], dtype=torch.float64)
    """
    magnitudes = magnitudes.to(histogram.counts.device, torch.float64)
    scale = scale_from_amax(amax.reshape(-1), float(magnitudes[-1])).to(torch.float64)
    return _mean(histogram, _squared_error(histogram, scale / histogram.width, magnitudes) * histogram.width**2)


def signal_power(histogram: Histogram) -> Tensor:
    """Return the mean of x**2, float64 [rows], in squared units of the data; 0 for a row without data."""
    return _mean(histogram, histogram.energy)


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """Return the ratio of two powers in dB; +inf without noise.

    >>> decibels(torch.tensor([100.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([20., inf])
    """
    return (10 * torch.log10(signal / noise)).where(noise > 0, torch.inf)


def _mean(histogram: Histogram, total: Tensor) -> Tensor:
    """Return sums over values as means. A row of zeros has exactly 0, not its bin's centre."""
    return (total / histogram.count).where(histogram.amax > 0, 0.0)


def _squared_error(histogram: Histogram, scale: Tensor, magnitudes: Tensor) -> Tensor:
    """Return the summed squared error for one scale a row (float64 [rows], in bins), in squared bins."""
    centers, scale = histogram.centers, scale.unsqueeze(1)
    code = torch.bucketize(centers / scale, (magnitudes[1:] + magnitudes[:-1]) / 2)
    return (histogram.counts * (centers - magnitudes[code] * scale) ** 2).sum(1)


def _errors(histogram: Histogram, candidates: Tensor, magnitudes: Tensor) -> Tensor:
    """Return the summed squared error of each candidate, in squared bins: float64 [candidates, rows]."""
    high, step, middle = magnitudes[-1], magnitudes.diff(), (magnitudes[1:] + magnitudes[:-1]) / 2
    count, total, power = _tail_sums(histogram)
    gain = []
    for i in candidates.split(max(1, _CHUNK // len(step))):
        first = (middle * i.unsqueeze(1) / high - 0.5).ceil().to(torch.int64)
        # An embedding bag is a weighted sum of looked-up rows: five times faster than look-up, then sum.
        # Both sums hold integers (or dyadic fractions, FP8) and are exact up to 2**53.
        values, counts = (
            F.embedding_bag(first, table, mode="sum", per_sample_weights=weights.expand(first.shape).contiguous())
            for table, weights in ((total, step), (count, step * middle))
        )
        gain.append(high * values - i.unsqueeze(1) * counts)
    return power[0] - 2 * candidates.unsqueeze(1) / high**2 * torch.cat(gain)


def _fine_errors(histogram: Histogram, candidates: Tensor, exact: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """Return the errors of the candidates, and of the exact maximum, on a grid finer than the bins."""
    count, total, power = (sums[candidates] for sums in _tail_sums(histogram))
    i = candidates.unsqueeze(1)
    clipping = power - 2 * i * total + i**2 * count
    rounding = histogram.count / (12 * high**2)
    return rounding * i**2 + clipping, rounding * exact**2


def _tail_sums(histogram: Histogram) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of counts, counts * x and counts * x**2 over bins k and up, each float64 [BINS + 1, rows]."""
    counts = histogram.counts.t()
    # Integer sums are exact, and the same in any order; the squares fit for fewer than 2**37 values.
    twice = torch.arange(1, 2 * BINS, 2, device=counts.device).unsqueeze(1)  # 2 * x, an integer
    sums = []
    for values, unit in ((counts, 1), (counts * twice, 2), (counts * twice**2, 4)):
        tail = values.flip(0).cumsum(0).flip(0)
        sums.append(torch.cat([tail, torch.zeros_like(tail[:1])]).to(torch.float64) / unit)
    return sums[0], sums[1], sums[2]


@search_method("mse")
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    levels = magnitudes_of(descriptor)
    if descriptor.scale_format == "float32":
        return mse(histogram, levels)
    # Scales are rounded up, here to powers of two, so few of them are worth a try.
    scale, high = grid_parameters(descriptor, histogram.amax).scale, float(levels[-1])
    ranges = torch.stack([scale * 2.0**-k * high for k in range(_OCTAVES)])
    best = torch.stack([quantization_error(histogram, amax, levels) for amax in ranges]).argmin(0, keepdim=True)
    return torch.minimum(ranges.gather(0, best)[0], histogram.amax)
