"""Calibrator: data in, amax out. The base class, and the registry that ``calib_method`` names.

Adding a calibrator is one class in one file::

    @register_calibrator("max")
    class MaxCalibrator(Calibrator): ...
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from fakequant.calib.extremes import Extremes
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from typing_extensions import Self


class DataRange(NamedTuple):
    """The range that a calibrator found.

    Attributes:
        amax: the upper end, or the largest magnitude on a symmetric grid; at least 0.
        amin: the lower end, at most 0, shaped like amax; None on a symmetric grid.
    """

    amax: Tensor
    amin: Tensor | None


class Calibrator(abc.ABC):
    """Collects statistics of one tensor, batch by batch, and computes its range.

    Args:
        num_bits: as for ``QuantDescriptor``.
        axis: axis or axes that keep their own range; None for one range per tensor.
        unsigned: the grid has no negative values; seeing one makes ``compute_range`` raise.
        narrow_range: as for ``QuantDescriptor``; it does not change amax.

    Attributes:
        descriptor: the grid that the arguments describe.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: int | tuple[int, ...] | None = None,
        unsigned: bool = False,
        *,
        narrow_range: bool = False,
    ) -> None:
        self.descriptor = QuantDescriptor(num_bits, axis=axis, unsigned=unsigned, narrow_range=narrow_range)

    @abc.abstractmethod
    def collect(self, x: Tensor) -> None:
        """Take in one batch. An empty tensor is no data.

        Raises:
            CalibrationError: the batch has another number of channels than those before.
        """

    @abc.abstractmethod
    def merge(self, other: "Self") -> None:
        """Take in all that another calibrator has seen, as if its data had been collected here."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget all data."""

    @abc.abstractmethod
    def compute_range(self, method: str | None = None, *, percentile: float = 99.99) -> DataRange | None:
        """Return the range of the data collected so far, which stays as it is.

        Args:
            method: name of a search method; None for the calibrator's own.
            percentile: for the method of that name, above 1 and at most 100.

        Returns:
            float32, shaped as ``arithmetic.kept_shape`` says (0-d per tensor), sharing no memory
            with anything; None if nothing was collected.

        Raises:
            InvalidValueError: a method that is unknown or that this calibrator cannot serve.
            CalibrationError: the data held NaN or Inf, or negative values for an unsigned grid.
        """

    def compute_amax(self, method: str | None = None, *, percentile: float = 99.99) -> Tensor | None:
        """Return the largest magnitude of the range; arguments and errors as in ``compute_range``."""
        found = self.compute_range(method, percentile=percentile)
        if found is None or found.amin is None:
            return None if found is None else found.amax
        return torch.maximum(found.amax, found.amin.abs())

    def __init_subclass__(cls) -> None:
        if "compute_amax" in vars(cls):  # nothing would call it
            raise InvalidTypeError(f"{cls.__name__}: expected a compute_range of its own, got a compute_amax")

    def _check_data(self, seen: Extremes) -> None:
        if seen.num_nan or seen.num_inf:
            raise CalibrationError(f"the data held {seen.num_nan} NaN and {seen.num_inf} Inf")
        if not self.descriptor.unsigned or self.descriptor.affine:
            return
        minimum = float(seen.minimum.min())
        if minimum < 0:
            raise CalibrationError(
                f"the data held negative values (minimum {minimum:.6g}), which an unsigned grid cannot represent"
            )

    def __repr__(self) -> str:
        d = self.descriptor
        return f"{type(self).__name__}(num_bits={d.num_bits} axis={d.axis} unsigned={d.unsigned} {self._state()})"

    @abc.abstractmethod
    def _state(self) -> str:
        """Return what ``repr`` says of the data seen."""


CALIBRATORS: dict[str, type[Calibrator]] = {}

_Registered = TypeVar("_Registered", bound=type[Calibrator])


def register_calibrator(name: str) -> Callable[[_Registered], _Registered]:
    """Register the decorated class as a ``calib_method``; a name that is taken raises InvalidValueError."""

    def register(calibrator: _Registered) -> _Registered:
        if name in CALIBRATORS:
            raise InvalidValueError(f"calibrator: expected a new name, got {name!r}, which is registered")
        CALIBRATORS[name] = calibrator
        return calibrator

    return register


def calibrator_for(descriptor: QuantDescriptor) -> Calibrator:
    """Return a new calibrator of the kind that ``descriptor.calib_method`` names.

    Raises:
        InvalidValueError: no calibrator has that name; lists those that exist.

    >>> calibrator_for(QuantDescriptor(8, axis=0))
    MaxCalibrator(num_bits=8 axis=0 unsigned=False calib_amax=None track_amax=False)
    """
    if descriptor.calib_method not in CALIBRATORS:
        raise InvalidValueError(f"calib_method: expected one of {sorted(CALIBRATORS)}, got {descriptor.calib_method!r}")
    made = CALIBRATORS[descriptor.calib_method]()
    made.descriptor = descriptor
    return made
