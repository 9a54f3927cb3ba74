"""Histogram: counts of absolute values, in bins whose width is a power of two.

Bin k of a row holds ``k * 2**e <= |x| < (k + 1) * 2**e``. The exponent e is a pure
function of the row's largest finite |x|::

    max = m * 2**E,  0.5 <= m < 1     =>    e = E - 12    =>    2048 <= max / 2**e < 4096 = BINS

so the largest value always falls into the upper half of the bins. Bins of two exponents
nest exactly, ``floor(floor(x / 2**e) / 2**d) = floor(x / 2**(e + d))``, so a histogram is
widened by adding up neighbouring bins. The state therefore depends on the multiset of
values only: never on their order, on how they are split into batches, or on which
process saw them. Scaling by a power of two is exact in float32, so no value ever lands
in the wrong bin by rounding.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fakequant.arithmetic import Axis, as_rows
from fakequant.arithmetic.power_of_two import power_of_two
from fakequant.calib.extremes import Extremes, as_reducible, finite_extremes
from fakequant.errors import CalibrationError, InvalidValueError

BINS = 4096
"""Bins of every row."""

MIN_EXPONENT = -126
"""Smallest exponent of a bin width: 2**126 and 2**-126 are both normal numbers of float32."""

_LOG2_BINS = BINS.bit_length() - 1
_CHUNK = 2**19  # values binned at a time: temporaries stay in the cache (1e7 values: 5 ms, unchunked 16 ms)


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Statistics of one tensor (one row) or of each channel of one (a row a channel).

    Attributes:
        counts: int64 [rows, BINS].
        exponent: int64 [rows]; a bin of the row is ``2**exponent`` wide.
        extremes: exact, of [rows]; the NaN and Inf that it counts are not in counts.

    >>> h = Histogram.of(torch.tensor([0.0, -1.0, 3.0])).merge(Histogram.of(torch.tensor([100.0])))
    >>> h.count, h.amax, h.exponent, h.extremes.minimum
    (tensor([4]), tensor([100.]), tensor([-5]), tensor([-1.]))
    """

    counts: Tensor
    exponent: Tensor
    extremes: Extremes

    @classmethod
    def of(cls, x: Tensor, axis: Axis = None) -> "Histogram":
        """Return the histogram of x, counted on x's device.

        Args:
            x: any real tensor; it may be empty. It is read as float32.
            axis: axis or axes that keep their own row, in the order of ``arithmetic.kept_shape``;
                None for one row. 32 KiB a row.

        Raises:
            InvalidTypeError: x is complex.
            InvalidValueError: an axis that x does not have.
        """
        rows = as_rows(as_reducible(x), axis)
        extremes = finite_extremes(rows, axis=None if len(rows) == 1 else 0)
        extremes = extremes._replace(minimum=extremes.minimum.reshape(-1), maximum=extremes.maximum.reshape(-1))
        exponent = _exponent(extremes.amax)
        if extremes.num_nan or extremes.num_inf:
            finite = rows.isfinite()
            counts = _count(rows.where(finite, 0.0), exponent)
            counts[:, 0] -= (~finite).sum(1)
        else:
            counts = _count(rows, exponent)
        return cls(counts, exponent, extremes)

    @classmethod
    def from_counts(cls, counts: Tensor, extremes: Extremes) -> "Histogram":
        """Return the histogram with these counts, which are in the bins that the extremes ask for."""
        return cls(counts, _exponent(extremes.amax), extremes)

    def counts_up_to(self, amax: Tensor) -> Tensor:
        """Return the counts in the bins of a histogram whose largest |x| are these [rows], and no less than its own."""
        return _widened(self, _exponent(amax))

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the histogram of the data of both, row by row: exact, associative and commutative.

        Raises:
            CalibrationError: the two have different numbers of rows.
        """
        if len(self.counts) != len(other.counts):
            raise CalibrationError(f"histogram: expected {len(self.counts)} rows, got {len(other.counts)}")
        exponent = torch.maximum(self.exponent, other.exponent)
        return Histogram(
            counts=_widened(self, exponent) + _widened(other, exponent),
            exponent=exponent,
            extremes=self.extremes.merge(other.extremes),
        )

    @staticmethod
    def stack(histograms: Sequence["Histogram"]) -> "Histogram":
        """Return the rows of all, one below the other, so that one search serves many tensors.

        Raises:
            InvalidValueError: the sequence is empty.
        """
        if not histograms:
            raise InvalidValueError("histograms: expected one or more, got none")
        minimum, maximum, num_nan, num_inf = zip(*(h.extremes for h in histograms), strict=True)
        return Histogram(
            counts=torch.cat([h.counts for h in histograms]),
            exponent=torch.cat([h.exponent for h in histograms]),
            extremes=Extremes(torch.cat(minimum), torch.cat(maximum), sum(num_nan), sum(num_inf)),
        )

    def to(self, device: torch.device | str) -> "Histogram":
        """Return the same histogram on another device."""
        minimum, maximum = self.extremes.minimum.to(device), self.extremes.maximum.to(device)
        extremes = self.extremes._replace(minimum=minimum, maximum=maximum)
        return Histogram(self.counts.to(device), self.exponent.to(device), extremes)

    @property
    def amax(self) -> Tensor:
        """Exact largest finite |x|, float32 [rows]; 0 where nothing was seen."""
        return self.extremes.amax

    @property
    def count(self) -> Tensor:
        """Number of finite values, int64 [rows]."""
        return self.counts.sum(1)

    @property
    def width(self) -> Tensor:
        """Width of a bin in the unit of the data, float64 [rows]."""
        return power_of_two(self.exponent).to(torch.float64)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin in units of its width, float64 [BINS]."""
        return torch.arange(BINS, dtype=torch.float64, device=self.counts.device) + 0.5

    @property
    def energy(self) -> Tensor:
        """The sum of x**2, each value taken at the centre of its bin, float64 [rows]."""
        return (self.counts * self.centers**2).sum(1) * self.width**2


def _exponent(amax: Tensor) -> Tensor:
    exponent = torch.frexp(amax).exponent.to(torch.int64) - _LOG2_BINS
    return exponent.where(amax > 0, MIN_EXPONENT).clamp(min=MIN_EXPONENT)


def _count(rows: Tensor, exponent: Tensor) -> Tensor:
    """Return int64 counts [rows, BINS] of finite rows [rows, values].

    ``torch.bincount`` counts in int64 and takes a third of the time of ``torch.histc``, which
    counts in float32 (so no further than 2**24) and rounds its bin positions.
    """
    num_rows = len(rows)
    scale = power_of_two(-exponent).unsqueeze(1)
    offset = torch.arange(0, num_rows * BINS, BINS, dtype=torch.int32, device=rows.device).unsqueeze(1)
    counts = torch.zeros(num_rows * BINS, dtype=torch.int64, device=rows.device)
    # A chunk must be worth the walk over all the bins that adding its counts takes.
    chunk = max(_CHUNK, num_rows * BINS) // max(num_rows, 1)
    for part in rows.split(chunk, dim=1):
        bins = (part * scale).abs_().to(torch.int32)
        if num_rows > 1:
            bins += offset
        counts += torch.bincount(bins.flatten(), minlength=len(counts))
    return counts.view(num_rows, BINS)


def _widened(histogram: Histogram, exponent: Tensor) -> Tensor:
    """Return the counts for bins of width 2**exponent, which is no less than the histogram's own."""
    if torch.equal(histogram.exponent, exponent):
        return histogram.counts
    # Shifting out all bits of a bin number gives bin 0; by 64 bits and more a shift is undefined.
    shift = (exponent - histogram.exponent).clamp(max=_LOG2_BINS).unsqueeze(1)
    target = torch.arange(BINS, device=exponent.device) >> shift
    return torch.zeros_like(histogram.counts).scatter_add_(1, target, histogram.counts)
