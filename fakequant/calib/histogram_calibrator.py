"""HistogramCalibrator: one pass over the data serves every search method."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fakequant.arithmetic import kept_shape
from fakequant.calib.additive import AdditiveCalibrator
from fakequant.calib.affine import Halves, check_affine_method, find_range
from fakequant.calib.calibrator import DataRange, register_calibrator
from fakequant.calib.extremes import Extremes
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.methods import checked_method
from fakequant.calib.percentile import check_percentile
from fakequant.calib.search import find_amax
from fakequant.errors import CalibrationError

if TYPE_CHECKING:
    from typing_extensions import Self


@register_calibrator("histogram")
class HistogramCalibrator(AdditiveCalibrator):
    """Keeps one histogram (32 KiB, or as much a channel), whatever the amount of data.

    Args:
        num_bits: see ``Calibrator``.
        axis: see ``Calibrator``.
        unsigned: see ``Calibrator``.
        narrow_range: see ``Calibrator``.

    >>> import torch
    >>> calibrator = HistogramCalibrator()
    >>> calibrator.collect(torch.arange(1001.0))
    >>> calibrator.compute_amax("percentile", percentile=50.0), calibrator.compute_amax("max")
    (tensor(500.2500), tensor(1000.))
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: int | tuple[int, ...] | None = None,
        unsigned: bool = False,
        *,
        narrow_range: bool = False,
    ) -> None:
        super().__init__(num_bits, axis, unsigned, narrow_range=narrow_range)
        self.reset()

    @property
    def histogram(self) -> Histogram | None:
        """What was collected, a row a channel; None before the first batch."""
        return self._histogram

    @property
    def halves(self) -> Halves | None:
        """What was collected for an affine grid; None before the first batch, and for a symmetric one."""
        return self._halves

    def collect(self, x: Tensor) -> None:
        """Take in one batch; see ``Calibrator.collect``."""
        if x.numel() > 0:
            axis = self.descriptor.axis
            seen = Halves.of(x, axis) if self.descriptor.affine else Histogram.of(x, axis)
            self._add(seen, kept_shape(x.shape, axis))

    def merge(self, other: "Self") -> None:
        """Take in all that another calibrator has seen; see ``Calibrator.merge``."""
        seen = other._halves if self.descriptor.affine else other._histogram
        if seen is not None:
            self._add(seen, other._shape)

    def reset(self) -> None:
        """Forget all data."""
        self._histogram: Histogram | None = None
        self._halves: Halves | None = None
        self._shape: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the range; None before the first batch."""
        return None if self._histogram is None and self._halves is None else self._shape

    def maxima(self, shape: tuple[int, ...]) -> Tensor:
        """Return -minimum and maximum of each row; see ``AdditiveCalibrator.maxima``."""
        histogram, _ = self._rows(shape)
        return histogram.extremes.outward

    def sums(self, shape: tuple[int, ...], maxima: Tensor) -> Tensor:
        """Return how many NaN and Inf, the counts, and for halves all values; see ``AdditiveCalibrator.sums``."""
        histogram, every = self._rows(shape)
        everywhere = Extremes.from_outward(maxima, (len(histogram.counts),), 0, 0).amax
        return torch.cat([torch.tensor(histogram.extremes[2:]), histogram.counts_up_to(everywhere).flatten(), every])

    def load(self, shape: tuple[int, ...], maxima: Tensor, sums: Tensor) -> None:
        """See ``AdditiveCalibrator.load``."""
        num_rows = len(maxima) // 2
        (num_nan, num_inf), counts, every = sums[:2].tolist(), *sums[2:].tensor_split([num_rows * BINS])
        extremes = Extremes.from_outward(maxima, (num_rows,), num_nan, num_inf)
        histogram = Histogram.from_counts(counts.view(num_rows, BINS), extremes)
        self.reset()
        self._add(Halves(histogram, every) if self.descriptor.affine else histogram, shape)

    def _rows(self, shape: tuple[int, ...]) -> tuple[Histogram, Tensor]:
        """Return what was collected, maybe nothing, on the CPU: histogram, and for halves how many values in all."""
        nothing = torch.empty(math.prod(shape), 0)
        if self.descriptor.affine:
            halves = (self._halves or Halves.of(nothing, axis=0)).to("cpu")
            return halves.histogram, halves.count
        return (self._histogram or Histogram.of(nothing, axis=0)).to("cpu"), torch.empty(0, dtype=torch.int64)

    def compute_range(self, method: str | None = None, *, percentile: float = 99.99) -> DataRange | None:
        """Return the range that a search method finds; see ``Calibrator.compute_range``.

        The method is a name that ``find_amax`` or, for an affine grid, ``find_range`` knows; None means
        "entropy", and "mse" on a float or affine grid.
        """
        grid, halves, histogram = self.descriptor, self._halves, self._histogram
        check_percentile(percentile)
        if method is None:
            method = "mse" if grid.affine or grid.is_float else "entropy"
        if grid.affine:
            check_affine_method(method)
        else:
            checked_method(method, grid)
        if halves is not None:
            self._check_data(halves.histogram.extremes)
            amax, amin = find_range(halves, grid, method, percentile=percentile)
        elif histogram is not None:
            self._check_data(histogram.extremes)
            amax, amin = find_amax(histogram, grid, method, percentile=percentile), None
        else:
            return None
        return DataRange(amax.reshape(self._shape), None if amin is None else amin.reshape(self._shape))

    def _add(self, seen: Histogram | Halves, shape: tuple[int, ...]) -> None:
        before = self._halves if isinstance(seen, Halves) else self._histogram
        if before is None:
            self._shape = shape
        elif shape != self._shape:
            raise CalibrationError(f"amax shape: expected {self._shape} as in the batches before, got {shape}")
        if isinstance(seen, Halves):
            self._halves = seen if self._halves is None else self._halves.merge(seen)
        else:
            self._histogram = seen if self._histogram is None else self._histogram.merge(seen)

    def __str__(self) -> str:
        return f"HistogramCalibrator({self._state()})"

    def _state(self) -> str:
        seen = self._histogram if self._halves is None else self._halves.histogram
        if seen is None:
            return "calib_bin_edges=None"
        last = float((seen.width * BINS).max())
        return f"calib_bin_edges=[0.000, ..., {last:.3f}]({BINS + 1})"
