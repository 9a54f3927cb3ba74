import math

import numpy as np
import pytest
import torch

from fakequant.calib import Histogram, find_amax, lsq
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError


@pytest.mark.parametrize(
    ("grid", "high"),
    [(QuantDescriptor(2), 1), (QuantDescriptor(2, unsigned=True), 3), (QuantDescriptor(8), 127)],
    ids=str,
)
def test_it_is_the_papers_first_step_times_the_highest_code(grid, high):
    x = torch.randn(100_000).abs()
    expected = high * 2 * x.numpy().astype(np.float64).mean() / math.sqrt(high)
    histogram = Histogram.of(x)
    # Every value is at most half a bin from the centre of its bin.
    tolerance = math.sqrt(high) * histogram.width.item()
    assert find_amax(histogram, grid, "lsq").item() == pytest.approx(expected, abs=tolerance)


def test_each_row_has_its_own():
    x = torch.rand(1000)
    rows = lsq(Histogram.of(torch.stack([x, x**4]), axis=0), high=1)
    alone = [lsq(Histogram.of(values), high=1) for values in (x, x**4)]
    assert torch.equal(rows, torch.cat(alone))


@pytest.mark.parametrize("x", [torch.empty(0), torch.zeros(10)], ids=["empty", "zeros"])
def test_nothing_has_no_range(x):
    assert lsq(Histogram.of(x), high=7).tolist() == [0.0]


def test_the_sign_does_not_matter():
    x = torch.rand(1000)
    assert torch.equal(lsq(Histogram.of(-x), high=1), lsq(Histogram.of(x), high=1))


def test_it_is_for_integer_grids():
    with pytest.raises(InvalidValueError, match="got 'lsq'"):
        find_amax(Histogram.of(torch.rand(10)), QuantDescriptor((4, 3)), "lsq")
