import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fakequant.calib import Histogram, percentile
from fakequant.errors import InvalidValueError


def oracle(x: np.ndarray, share: str, width: float) -> np.float32:
    magnitude = np.sort(np.abs(x))
    needed = math.ceil(Fraction(share) / 100 * len(x))
    edge = (math.floor(magnitude[needed - 1] / width) + 1) * width
    return np.float32(min(edge, magnitude[-1]))


@pytest.mark.parametrize("share", ["99.99", "99.9", "50", "1e-3", "100"])
def test_it_is_the_upper_edge_of_the_oracles_bin(values, share):
    h = Histogram.of(values)
    assert percentile(h, float(share)).item() == oracle(values.numpy(), share, h.width.item())


def test_a_hundred_percent_is_the_exact_maximum():
    assert percentile(Histogram.of(torch.tensor([0.1, -0.7])), 100).item() == np.float32(0.7)


@pytest.mark.parametrize("count", [10_000, 100_000_000])
def test_the_share_is_decimal(count):
    # In binary 99.9 is a little more than that, so 99.9 % of 10000 values would be more than 9990.
    outliers = count // 1_000
    h = Histogram.of(torch.tensor([1.0, 4.0]))
    h.counts[0] = 0
    h.counts[0, 1024], h.counts[0, -1] = count - outliers, outliers
    assert percentile(h, 99.9).item() == 1025 / 1024 * 2.0


@pytest.mark.parametrize("share", [0, -1, 100.001, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidValueError, match=f"above 0 and at most 100, got {share}"):
        percentile(Histogram.of(torch.ones(1)), share)
