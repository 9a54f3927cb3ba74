"""MaxCalibrator: the range is the largest absolute value."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fakequant.arithmetic import grouped, per_block
from fakequant.calib.additive import AdditiveCalibrator
from fakequant.calib.calibrator import DataRange, register_calibrator
from fakequant.calib.extremes import Extremes, finite_extremes
from fakequant.calib.percentile import check_percentile
from fakequant.errors import CalibrationError, InvalidValueError

if TYPE_CHECKING:
    from typing_extensions import Self


@register_calibrator("max")
class MaxCalibrator(AdditiveCalibrator):
    """Keeps the smallest and the largest value, so its memory is a number or two a channel.

    Args:
        num_bits: see ``Calibrator``.
        axis: see ``Calibrator``.
        unsigned: see ``Calibrator``.
        track_amax: also keep the amax of every batch, in ``amaxs``.
        narrow_range: see ``Calibrator``.

    >>> import torch
    >>> calibrator = MaxCalibrator(8, None, False)
    >>> calibrator.collect(torch.tensor([1.0, -3.0])), calibrator.compute_amax()
    (None, tensor(3.))
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: int | tuple[int, ...] | None = None,
        unsigned: bool = False,
        track_amax: bool = False,
        *,
        narrow_range: bool = False,
    ) -> None:
        super().__init__(num_bits, axis, unsigned, narrow_range=narrow_range)
        self._amaxs: list[Tensor] | None = [] if track_amax else None
        self._seen: Extremes | None = None

    @property
    def amaxs(self) -> list[Tensor]:
        """The amax of each batch, as ``compute_amax`` would return it; needs ``track_amax=True``."""
        if self._amaxs is None:
            raise InvalidValueError("amaxs: expected a MaxCalibrator with track_amax=True, got track_amax=False")
        return [amax.clone() for amax in self._amaxs]

    def collect(self, x: Tensor) -> None:
        """Take in one batch; see ``Calibrator.collect``."""
        if x.numel() == 0:
            return
        batch = finite_extremes(*grouped(self.descriptor, x))
        if self.descriptor.block_size is not None:
            low, high = (per_block(end, self.descriptor.block_axis) for end in batch[:2])
            batch = batch._replace(minimum=low, maximum=high)
        self._add(batch)
        if self._amaxs is not None:
            self._amaxs.append(batch.amax)

    def merge(self, other: "Self") -> None:
        """Take in all that another calibrator has seen; see ``Calibrator.merge``."""
        amaxs = None if self._amaxs is None else self._amaxs + other.amaxs
        if other._seen is not None:
            self._add(other._seen)
        self._amaxs = amaxs

    def reset(self) -> None:
        """Forget all data."""
        self._seen = None
        self._amaxs = None if self._amaxs is None else []

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the range; None before the first batch."""
        return None if self._seen is None else tuple(self._seen.minimum.shape)

    def maxima(self, shape: tuple[int, ...]) -> Tensor:
        """Return -minimum and maximum; see ``AdditiveCalibrator.maxima``."""
        return (self._seen or Extremes.none(shape)).outward.cpu()

    def sums(self, shape: tuple[int, ...], maxima: Tensor) -> Tensor:
        """Return how many NaN and Inf; see ``AdditiveCalibrator.sums``."""
        return torch.tensor((self._seen or Extremes.none(shape))[2:])

    def load(self, shape: tuple[int, ...], maxima: Tensor, sums: Tensor) -> None:
        """See ``AdditiveCalibrator.load``."""
        num_nan, num_inf = sums.tolist()
        self._seen = Extremes.from_outward(maxima, shape, num_nan, num_inf)

    def compute_range(self, method: str | None = None, *, percentile: float = 99.99) -> DataRange | None:
        """Return the range of all values; see ``Calibrator.compute_range``. The method is None or "max"."""
        check_percentile(percentile)
        if method not in (None, "max"):
            raise InvalidValueError(
                f"method: expected None or 'max', got {method!r}: a MaxCalibrator keeps maxima only; "
                "collect with a HistogramCalibrator (calib_method='histogram')"
            )
        seen = self._seen
        if seen is None:
            return None
        self._check_data(seen)
        if not self.descriptor.affine:
            return DataRange(seen.amax, None)
        return DataRange(seen.maximum.clamp(min=0.0), seen.minimum.clamp(max=0.0))

    def _add(self, batch: Extremes) -> None:
        seen = self._seen
        if seen is None:
            self._seen = batch
            return
        if seen.minimum.shape != batch.minimum.shape:
            raise CalibrationError(
                f"amax shape: expected {tuple(seen.minimum.shape)} as in the batches before, "
                f"got {tuple(batch.minimum.shape)}"
            )
        self._seen = seen.merge(batch)

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._amaxs is not None})"

    def _state(self) -> str:
        amax = None if self._seen is None else self._seen.amax
        tracked = "" if self._amaxs is None else f" amaxs={self._amaxs}"
        return f"calib_amax={amax} track_amax={self._amaxs is not None}{tracked}"
