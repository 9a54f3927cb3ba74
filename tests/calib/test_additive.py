"""Statistics as two flat tensors: combined over any number of processes they are those of all the data."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from fakequant.calib import MaxCalibrator, calibrator_for
from fakequant.calib.additive import is_additive
from fakequant.descriptor import QuantDescriptor

GRIDS = {
    "max": QuantDescriptor(8),
    "max channels": QuantDescriptor(8, axis=1),
    "max blocks": QuantDescriptor(4, block_size=2),
    "max affine": QuantDescriptor(8, affine=True, axis=0),
    "histogram": QuantDescriptor(8, calib_method="histogram"),
    "histogram channels": QuantDescriptor(8, calib_method="histogram", axis=(0, 1)),
    "histogram affine": QuantDescriptor(8, calib_method="histogram", affine=True),
    "histogram affine channels": QuantDescriptor(8, calib_method="histogram", affine=True, axis=1),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
values = st.floats(width=32) | st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3e38])
batches = st.lists(arrays("float32", (3, 4), elements=values).map(torch.from_numpy), min_size=1, max_size=4)


def collected(grid, data):
    calibrator = calibrator_for(grid)
    for batch in data:
        calibrator.collect(batch)
    return calibrator


def combine(calibrators):
    """Do what ``fakequant.distributed.summing`` does, with NumPy in place of a process group."""
    shape = next(c.shape for c in calibrators if c.shape is not None)
    maxima = torch.from_numpy(np.maximum.reduce([c.maxima(shape).numpy() for c in calibrators]))
    sums = torch.from_numpy(sum(c.sums(shape, maxima).numpy() for c in calibrators))
    for calibrator in calibrators:
        calibrator.load(shape, maxima, sums)


def state(calibrator):
    """Return every tensor and number of a calibrator, as bytes: -0.0 and 0.0 differ."""
    found, queue = [], [vars(calibrator)]
    while queue:
        value = queue.pop(0)
        if isinstance(value, torch.Tensor):
            found.append((tuple(value.shape), value.dtype, value.numpy().tobytes()))
        elif isinstance(value, dict):
            queue += [value[key] for key in sorted(value) if key != "descriptor"]
        elif isinstance(value, tuple):
            queue += value
        elif hasattr(value, "__dataclass_fields__"):
            queue.append(vars(value))
        else:
            found.append(value)
    return found


@every_grid
@settings(max_examples=15)
@given(shares=st.lists(batches, min_size=1, max_size=3), idle=st.booleans())
def test_combining_is_collecting_all(grid, shares, idle):
    calibrators = [collected(grid, share) for share in shares] + [collected(grid, [])] * idle
    combine(calibrators)
    expected = state(collected(grid, [batch for share in shares for batch in share]))
    assert all(state(calibrator) == expected for calibrator in calibrators)


@every_grid
def test_a_combined_calibrator_collects_on(grid):
    a, b, c = (torch.randn(3, 4) * 10**i for i in range(3))
    one, other = collected(grid, [a]), collected(grid, [b])
    combine([one, other])
    one.collect(c)
    assert state(one) == state(collected(grid, [a, b, c]))


class Louder(MaxCalibrator):
    """Computes differently from the same statistics."""

    def compute_range(self, method=None, *, percentile=99.99):
        found = super().compute_range(method)
        return found and found._replace(amax=found.amax * 2)


class Counting(MaxCalibrator):
    """Collects something more."""

    number = 0

    def collect(self, x):
        super().collect(x)
        self.number += 1

    def merge(self, other):
        super().merge(other)
        self.number += other.number


@pytest.mark.parametrize(("kind", "additive"), [(MaxCalibrator, True), (Louder, True), (Counting, False)])
def test_a_subclass_that_merges_in_its_own_way_is_not_summed(kind, additive):
    assert is_additive(kind()) is additive
