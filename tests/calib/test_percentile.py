import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fakequant.calib import Histogram, calibrator_for, percentile
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import FakeQuantError, InvalidTypeError, InvalidValueError


def oracle(x: np.ndarray, share: str, width: float) -> np.float32:
    magnitude = np.sort(np.abs(x))
    needed = math.ceil(Fraction(share) / 100 * len(x))
    edge = (math.floor(magnitude[needed - 1] / width) + 1) * width
    return np.float32(min(edge, magnitude[-1]))


@pytest.mark.parametrize("share", ["99.99", "99.9", "50", "1.5", "100"])
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


OUT_OF_RANGE = [0, -1, 0.9999, 1, True, 100.001, math.nan, math.inf]
NO_NUMBER = ["99", None, [99]]


@pytest.mark.parametrize("share", OUT_OF_RANGE)
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidValueError, match=f"expected percent, above 1 and at most 100, got {share}"):
        percentile(Histogram.of(torch.ones(1)), share)


@pytest.mark.parametrize("share", NO_NUMBER, ids=str)
def test_a_share_that_is_no_number_is_refused(share):
    with pytest.raises(InvalidTypeError, match="percentile: expected a number, got"):
        percentile(Histogram.of(torch.ones(1)), share)


@pytest.mark.parametrize("share", [*OUT_OF_RANGE, *NO_NUMBER], ids=str)
@pytest.mark.parametrize("method", ["max", "entropy"])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("calibrator", ["max", "histogram"])
def test_a_calibrator_refuses_a_share_that_it_does_not_need(calibrator, affine, method, share):
    made = calibrator_for(QuantDescriptor(calib_method=calibrator, affine=affine))
    with pytest.raises(FakeQuantError, match="percentile: expected"):
        made.compute_range(method, percentile=share)
