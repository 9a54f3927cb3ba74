"""LsqPlusCalibrator: where LSQ+ starts the range of a weight, from its mean and standard deviation.

Bhalgat et al. 2020, "LSQ+" (arXiv:2004.09576). Activations start at the least squared error there,
which is the search method "mse".
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fakequant.arithmetic import kept_axes, kept_shape
from fakequant.arithmetic.learned_ranges import lsq_plus_weight_amax
from fakequant.calib.calibrator import Calibrator, register_calibrator
from fakequant.errors import CalibrationError, InvalidValueError

if TYPE_CHECKING:
    from typing_extensions import Self


@register_calibrator("lsq+")
class LsqPlusCalibrator(Calibrator):
    """Keeps the count, sum and sum of squares, in float64, a channel.

    >>> calibrator = LsqPlusCalibrator(2)
    >>> calibrator.collect(torch.tensor([-1.0, 1.0]))
    >>> calibrator.compute_amax()
    tensor(1.5000)
    """

    def collect(self, x: Tensor) -> None:
        """Take in one batch; see ``Calibrator.collect``."""
        axis = self.descriptor.axis
        keep = kept_axes(axis, x.ndim)
        reduced = tuple(i for i in range(x.ndim) if i not in keep)
        values = x.detach().to(torch.float64)
        if x.numel() > 0:
            sums = [part.sum(reduced) if reduced else part for part in (torch.ones_like(values), values, values**2)]
            self._add(torch.stack(sums), kept_shape(x.shape, axis))

    def merge(self, other: "Self") -> None:
        """Take in all that another calibrator has seen; see ``Calibrator.merge``."""
        if other._sums is not None:
            self._add(other._sums, other._shape)

    def reset(self) -> None:
        """Forget all data."""
        self._sums = None

    def compute_amax(self, method: str | None = None, *, percentile: float = 99.99) -> Tensor | None:
        """Return LSQ+'s start; see ``Calibrator.compute_amax``. The method is None or "lsq+"."""
        bits = self.descriptor.num_bits
        if method not in (None, "lsq+"):
            raise InvalidValueError(
                f"method: expected None or 'lsq+', got {method!r}: this calibrator keeps moments only"
            )
        if not isinstance(bits, int) or self.descriptor.affine or self.descriptor.block_size is not None:
            expected = "a symmetric integer grid without blocks"
            raise InvalidValueError(f"method 'lsq+': expected {expected}, got {self.descriptor}")
        if self._sums is None:
            return None
        count, total, squares = self._sums
        mean = total / count
        amax = lsq_plus_weight_amax(mean, (squares / count - mean**2).clamp(min=0).sqrt(), bits)
        if not bool(amax.isfinite().all()):
            raise CalibrationError("the data held NaN or Inf")
        return amax.reshape(self._shape)

    _sums: Tensor | None = None
    _shape: tuple[int, ...] = ()

    def _add(self, sums: Tensor, shape: tuple[int, ...]) -> None:
        if self._sums is not None and shape != self._shape:
            raise CalibrationError(f"amax shape: expected {self._shape} as in the batches before, got {shape}")
        self._sums, self._shape = sums if self._sums is None else self._sums + sums, shape

    def _state(self) -> str:
        return f"count={0 if self._sums is None else int(self._sums[0].sum())}"
