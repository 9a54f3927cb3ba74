"""Percentile: the range that holds a given share of the values.

amax is the upper edge of the first bin at which the cumulative count reaches
ceil(p / 100 * N), and at most the exact maximum. So at least p percent of the values are
within amax, and p = 100 is the exact maximum. (pytorch-quantization's
calib/histogram.py returns the lower edge, which clips more than asked for.) The share is
taken as the decimal number that was written: 99.99 percent of 10000 values are 9999.
"""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.methods import search_method
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError


def percentile(histogram: Histogram, percentile: float = 99.99) -> Tensor:
    """Return the amax that holds this percentage of the values.

    Args:
        histogram: of [rows].
        percentile: above 1, at most 100: 0.9999 is a mistake for 99.99.

    Returns:
        float32 [rows]; 0 for a row without data.

    Raises:
        InvalidTypeError: the percentage is no number.
        InvalidValueError: it is out of range.

    >>> percentile(Histogram.of(torch.arange(1001.0)), 90.0), percentile(Histogram.of(torch.arange(1001.0)), 100)
    (tensor([900.2500]), tensor([1000.]))
    """
    check_percentile(percentile)
    share = Fraction(str(float(percentile))) / 100
    needed = [-(-share.numerator * n // share.denominator) for n in histogram.count.tolist()]
    reached = torch.tensor(needed, dtype=torch.int64, device=histogram.counts.device).unsqueeze(1)
    first = torch.searchsorted(histogram.counts.cumsum(1), reached).squeeze(1).clamp(max=BINS - 1)
    edge = (first + 1) * histogram.width
    return torch.minimum(edge.to(torch.float32), histogram.amax)


def check_percentile(percentile: object) -> None:
    """Check a percentage.

    Raises:
        InvalidTypeError: no number.
        InvalidValueError: out of range; a share of 1, such as 0.9999, is meant as percent.
    """
    if not isinstance(percentile, int | float | np.integer | np.floating):
        raise InvalidTypeError(f"percentile: expected a number, got {percentile!r}")
    if not 1 < percentile <= 100:
        raise InvalidValueError(f"percentile: expected percent, above 1 and at most 100, got {percentile}")


@search_method("percentile", on_weights=False)
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentage: float) -> Tensor:
    return percentile(histogram, percentage)
