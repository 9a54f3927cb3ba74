"""Statistics that processes add up: two flat tensors, whatever the calibrator.

The first holds numbers of which the largest counts, the second those that are summed; the bins
of the second are aligned by what the first came to in all processes. Both combine element by
element and exactly, so the outcome does not depend on the number of processes or their order.
"""

import abc
from typing import TypeGuard

from torch import Tensor

from fakequant.calib.calibrator import Calibrator


class AdditiveCalibrator(Calibrator):
    """A calibrator whose statistics are two flat tensors on the CPU that combine element by element."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the range; None before the first batch."""

    @abc.abstractmethod
    def maxima(self, shape: tuple[int, ...]) -> Tensor:
        """Return what combines by maximum, float32; of a range of this shape if nothing was collected."""

    @abc.abstractmethod
    def sums(self, shape: tuple[int, ...], maxima: Tensor) -> Tensor:
        """Return what combines by addition, int64; ``maxima`` is that of all processes."""

    @abc.abstractmethod
    def load(self, shape: tuple[int, ...], maxima: Tensor, sums: Tensor) -> None:
        """Replace what was collected by what all processes collected."""


def is_additive(calibrator: Calibrator) -> TypeGuard[AdditiveCalibrator]:
    """Whether the two tensors are all that was collected: not of a subclass that merges in a way of its own."""
    return isinstance(calibrator, AdditiveCalibrator) and _owner(calibrator, "merge") is _owner(calibrator, "load")


def _owner(calibrator: Calibrator, method: str) -> type:
    return next(cls for cls in type(calibrator).__mro__ if method in vars(cls))
