"""How far numbers are from what they should be, summed over everything that was added.

Signal and noise are sums of squares of the numbers and of their differences::

    SQNR = 10 log10(signal / noise) dB
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass
class Difference:
    """Sums over pairs of arrays.

    Attributes:
        largest: largest absolute difference; inf where one of two is NaN.
        size: number of elements.
        differing: how many of them are not equal. Two NaN are, and so are infinities of one sign.
        signal: sum of squares of what was expected, as far as it is finite.
        noise: sum of squares of the differences.
    """

    largest: float = 0.0
    size: int = 0
    differing: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in two arrays of one shape."""
        reference, value = expected.astype(np.float64), got.astype(np.float64)
        differs = (reference != value) & ~(np.isnan(reference) & np.isnan(value))
        distance = np.abs(np.subtract(value, reference, out=np.zeros_like(reference), where=differs))
        distance = np.where(np.isnan(distance), math.inf, distance)
        self.largest = max(self.largest, float(distance.max(initial=0.0)))
        self.size += reference.size
        self.differing += int(np.count_nonzero(differs))
        self.signal += float(np.square(reference, out=np.zeros_like(reference), where=np.isfinite(reference)).sum())
        self.noise += float(np.square(distance).sum())

    @property
    def share(self) -> float:
        """Share of the elements that differ."""
        return self.differing / self.size if self.size else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to difference in dB; inf if all are equal."""
        if self.noise == 0.0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio else -math.inf
