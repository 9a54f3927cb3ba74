"""Ranges with two ends, for affine grids: from one histogram of the positive values and one of the negative.

The values of an affine grid are the multiples of its scale from ``low - zero_point`` to
``high - zero_point``, so its error is that of a symmetric grid on each half, with as many
steps as the half has. "mse" tries the ends together as 64/64, 63/64, ... of the extremes, then
each end alone, twice; it is a descent, not exhaustive. "percentile" leaves half of the
share that it cuts off at each end. "entropy" is defined for symmetric ranges only.
"""

import dataclasses

import torch
from torch import Tensor

from fakequant.arithmetic import Axis, affine_parameters, as_rows, bounds_of
from fakequant.calib.calibrator import DataRange
from fakequant.calib.extremes import as_reducible
from fakequant.calib.histogram import Histogram
from fakequant.calib.mse import decibels
from fakequant.calib.percentile import check_percentile
from fakequant.calib.percentile import percentile as percentile_of
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError

AFFINE_METHODS = ("auto", "max", "mse", "percentile")

_FRACTIONS = 64
_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Halves:
    """The magnitudes of the positive and of the negative values of a tensor.

    Args:
        histogram: [2 * rows], the positive halves and below them the negative ones.
        count: all values, zeros included, int64 [rows].
    """

    histogram: Histogram
    count: Tensor

    @classmethod
    def of(cls, x: Tensor, axis: Axis = None) -> "Halves":
        """Return the halves of a tensor; axis as for ``Histogram.of``."""
        rows = as_rows(as_reducible(x), axis)
        halves = []
        for half in (rows, -rows):
            histogram = Histogram.of(half.clamp(min=0), axis=0)
            histogram.counts[:, 0] -= (half <= 0).sum(1)
            halves.append(histogram)
        both = Histogram.stack(halves)
        once = both.extremes._replace(num_nan=both.extremes.num_nan // 2)  # each NaN is in both halves
        every = torch.full((len(rows),), rows.shape[1], dtype=torch.int64, device=x.device)
        return cls(dataclasses.replace(both, extremes=once), every)

    def to(self, device: torch.device | str) -> "Halves":
        """Return the same halves on another device."""
        return Halves(self.histogram.to(device), self.count.to(device))

    def merge(self, other: "Halves") -> "Halves":
        """Return the halves of the data of both."""
        return Halves(self.histogram.merge(other.histogram), self.count + other.count)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The largest positive value, and the magnitude of the lowest negative one, of each row."""
        return _two(self.histogram.amax)

    def percentile(self, percentile: float) -> tuple[Tensor, Tensor]:
        """Return the ends that hold this percentage of the values, half of the rest beyond each."""
        counts = self.histogram.counts.clone()
        counts[:, 0] += self.count.repeat(2) - self.histogram.count
        return _two(percentile_of(dataclasses.replace(self.histogram, counts=counts), 100 - (100 - percentile) / 2))


def find_range(halves: Halves, grid: QuantDescriptor, method: str, *, percentile: float = 99.99) -> DataRange:
    """Return both ends of the range of each row, float32 [rows] on the halves' device.

    The search runs on the CPU, see ``find_amax``.

    Args:
        halves: of the data, on any device.
        grid: affine.
        method: one of AFFINE_METHODS; "auto" is "mse".
        percentile: for the method of that name, above 1 and at most 100.

    Raises:
        InvalidValueError: another method, or a bad percentile.

    >>> find_range(Halves.of(torch.arange(-250.0, 1001.0)), QuantDescriptor(8, affine=True), "max")
    DataRange(amax=tensor([1000.]), amin=tensor([-250.]))
    """
    check_affine_method(method)
    check_percentile(percentile)
    here = halves.to("cpu")
    amax, outward = here.percentile(percentile) if method == "percentile" else here.ends
    found = _least_error(here, grid, amax, outward) if method in ("auto", "mse") else DataRange(amax, -outward)
    return DataRange(*(end.to(halves.count.device) for end in found if end is not None))


def check_affine_method(method: str) -> None:
    """Raise InvalidValueError for a method that affine grids do not have."""
    if method not in AFFINE_METHODS:
        raise InvalidValueError(f"affine calibration method: expected one of {list(AFFINE_METHODS)}, got {method!r}")


def affine_error(halves: Halves, grid: QuantDescriptor, found: DataRange) -> Tensor:
    """Return the mean squared error of an affine grid over a range, float64 [rows], in squared units of the data.

    >>> halves = Halves.of(torch.linspace(-1, 4, 100_001))
    >>> found = DataRange(torch.tensor([4.0]), torch.tensor([-1.0]))
    >>> affine_error(halves, QuantDescriptor(8, affine=True, unsigned=True), found) * (255 / 5) ** 2
    tensor([0.0833], dtype=torch.float64)
    """
    assert found.amin is not None
    low, high = bounds_of(grid)
    scale, zero_point = affine_parameters(found.amin, found.amax, low, high)
    histogram = halves.histogram
    width = histogram.width.unsqueeze(1)
    unit = scale.repeat(2).to(torch.float64).unsqueeze(1) / width
    steps = torch.cat([high - zero_point, zero_point - low]).to(torch.float64).unsqueeze(1)
    centers = histogram.centers
    value = torch.minimum((centers / unit).round_(), steps).mul_(unit)
    squared = (value.sub_(centers).square_() * histogram.counts).sum(1) * width.squeeze(1) ** 2
    positive, negative = _two(squared)
    return (positive + negative) / halves.count


def affine_sqnr_db(halves: Halves, grid: QuantDescriptor, found: DataRange) -> Tensor:
    """Return the signal-to-quantization-noise ratio of each row, float64 [rows], in dB; +inf without error."""
    positive, negative = _two(halves.histogram.energy)
    flat = DataRange(*(end.reshape(-1) for end in found if end is not None))
    return decibels((positive + negative) / halves.count, affine_error(halves, grid, flat))


def _least_error(halves: Halves, grid: QuantDescriptor, amax: Tensor, outward: Tensor) -> DataRange:
    fractions = torch.arange(_FRACTIONS, 0, -1, device=amax.device) / _FRACTIONS
    best = _best_of(halves, grid, [DataRange(amax * f, -outward * f) for f in fractions])
    for _ in range(_ROUNDS):
        best = _best_of(halves, grid, [best, *(DataRange(amax * f, best.amin) for f in fractions)])
        best = _best_of(halves, grid, [best, *(DataRange(best.amax, -outward * f) for f in fractions)])
    return best


def _best_of(halves: Halves, grid: QuantDescriptor, candidates: list[DataRange]) -> DataRange:
    best = torch.stack([affine_error(halves, grid, candidate) for candidate in candidates]).argmin(0, keepdim=True)
    amax = torch.stack([candidate.amax for candidate in candidates]).gather(0, best)[0]
    amin = torch.stack([c.amin for c in candidates if c.amin is not None]).gather(0, best)[0]
    return DataRange(amax, amin)


def _two(rows: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = rows.chunk(2)
    return positive, negative
