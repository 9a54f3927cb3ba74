"""What float16 and bfloat16 hold: numbers, and the scales of Q and DQ."""

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant import arithmetic

_MASK_FILL = 1e6
"""No weight or bias of a network is as large; what is, fills a mask."""

_PRECISE_STEPS = 2.0**7
"""A scale of so many of the smallest numbers moves no int8 code by more than half a step when it is rounded."""

_CLEARLY_LARGER = 2.0**3
"""Codes of one channel in steps of the least scale are 8 times finer than those of a channel so much larger."""


@dataclasses.dataclass(frozen=True)
class FloatNumbers:
    """The numbers of one type.

    Args:
        dtype: the type.
        largest: its largest number.
        smallest: its smallest number above 0, subnormal.
    """

    dtype: ir.DataType
    largest: float
    smallest: float

    @property
    def least_scale(self) -> float:
        """The smallest scale that is stored: 2**-17 in float16."""
        return self.smallest * _PRECISE_STEPS

    def stored(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return a constant in this type.

        A mask's fill becomes the outermost number instead of inf, and a lone epsilon the smallest
        above 0: inf and 0 would make NaN of what the model computes with them.
        """
        odd = self.clamped(array)
        if odd.any():
            array = np.where(odd, np.copysign(np.clip(np.abs(array), self.smallest, self.largest), array), array)
        return array.astype(self.dtype.numpy())

    def clamped(self, array: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return where ``stored`` does more than round."""
        beyond: NDArray[np.bool_] = np.isfinite(array) & (np.abs(array) > self.largest)
        return beyond | self._vanishes(array)

    def _vanishes(self, array: NDArray[np.generic]) -> NDArray[np.bool_]:
        lone: NDArray[np.bool_] = (array != 0) & (np.abs(array) < self.smallest) & (array.size == 1)
        return lone

    def problem_of_constant(self, array: NDArray[np.generic]) -> str:
        """Return why a weight or bias cannot be stored, "" if it can; a lone number and a mask's fill always can."""
        finite = np.abs(array[np.isfinite(array)])
        beyond = finite[(finite > self.largest) & (finite < _MASK_FILL)]
        if array.size == 1 or not beyond.size:
            return ""
        return f"a constant has {beyond.max():.6g}, beyond {self._limit}"

    def problem_of_scale(self, scale: NDArray[np.generic], codes: ir.DataType) -> str:
        """Return why the scale of Q or DQ cannot be stored, "" if it can."""
        largest = float(scale.max()) * _largest_code(codes)
        if largest > self.largest:
            return f"values up to {largest:.6g}, beyond {self._limit}"
        if scale.min() < self.least_scale and scale.max() < self.least_scale * _CLEARLY_LARGER:
            return f"a scale of {scale.min():.3g}, below {self.least_scale:.3g}, the smallest that {self} holds well"
        return ""

    @property
    def _limit(self) -> str:
        return f"the {self.largest:.6g} of {self}"

    def __str__(self) -> str:
        """Return the name of the type."""
        return self.dtype.name.lower()


FLOAT_NUMBERS = {
    "float16": FloatNumbers(ir.DataType.FLOAT16, 65504.0, 2.0**-24),
    "bfloat16": FloatNumbers(ir.DataType.BFLOAT16, (2 - 2.0**-7) * 2.0**127, 2.0**-133),
}
"""By the name of the type."""


def _largest_code(codes: ir.DataType) -> float:
    """Return the largest absolute value of a type of codes."""
    if codes.is_floating_point():
        return arithmetic.FP8_E4M3_MAX
    bits = int(codes.itemsize * 8)
    return float(2 ** (bits - 1) if codes.is_signed() else 2**bits - 1)
