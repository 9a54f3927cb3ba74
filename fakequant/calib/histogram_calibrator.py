"""HistogramCalibrator: one pass over the data serves every search method."""

from typing import TYPE_CHECKING

from torch import Tensor

from fakequant.arithmetic import kept_shape
from fakequant.calib.calibrator import Calibrator, register_calibrator
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.methods import checked_method
from fakequant.calib.search import find_amax
from fakequant.errors import CalibrationError

if TYPE_CHECKING:
    from typing_extensions import Self


@register_calibrator("histogram")
class HistogramCalibrator(Calibrator):
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

    def collect(self, x: Tensor) -> None:
        """Take in one batch; see ``Calibrator.collect``."""
        if x.numel() > 0:
            axis = self.descriptor.axis
            self._add(Histogram.of(x, axis), kept_shape(x.shape, axis))

    def merge(self, other: "Self") -> None:
        """Take in all that another calibrator has seen; see ``Calibrator.merge``."""
        if other._histogram is not None:
            self._add(other._histogram, other._shape)

    def reset(self) -> None:
        """Forget all data."""
        self._histogram: Histogram | None = None
        self._shape: tuple[int, ...] = ()

    def compute_amax(self, method: str | None = None, *, percentile: float = 99.99) -> Tensor | None:
        """Return the range that a search method finds; see ``Calibrator.compute_amax``.

        The method is a name that ``find_amax`` knows; None means "entropy", and "mse" on an FP8 grid.
        """
        method = method or ("mse" if self.descriptor.is_fp8 else "entropy")
        checked_method(method, self.descriptor)
        seen = self._histogram
        if seen is None:
            return None
        self._check_data(seen.num_nan, seen.num_inf, float(seen.minimum.min()))
        return find_amax(seen, self.descriptor, method, percentile=percentile).reshape(self._shape)

    def _add(self, histogram: Histogram, shape: tuple[int, ...]) -> None:
        if self._histogram is None:
            self._histogram, self._shape = histogram, shape
            return
        if shape != self._shape:
            raise CalibrationError(f"amax shape: expected {self._shape} as in the batches before, got {shape}")
        self._histogram = self._histogram.merge(histogram)

    def __str__(self) -> str:
        return f"HistogramCalibrator({self._state()})"

    def _state(self) -> str:
        if self._histogram is None:
            return "calib_bin_edges=None"
        last = float((self._histogram.width * BINS).max())
        return f"calib_bin_edges=[0.000, ..., {last:.3f}]({BINS + 1})"
