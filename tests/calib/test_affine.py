import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakequant.arithmetic import affine_parameters, dequantize_affine, quantize_affine
from fakequant.calib import (
    DataRange,
    Halves,
    HistogramCalibrator,
    MaxCalibrator,
    affine_error,
    calibrator_for,
    find_range,
)
from fakequant.calib.affine import AFFINE_METHODS
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidValueError

GRID = QuantDescriptor(8, affine=True, unsigned=True, calib_method="histogram")
methods = pytest.mark.parametrize("method", AFFINE_METHODS)
# Mostly positive, a tail on either side: what an activation behind a GELU or SiLU looks like.
DATA = torch.cat([torch.randn(20000).abs(), -0.2 * torch.rand(10000), torch.tensor([9.0, -4.0, 0.0])])


def calibrator(grid: QuantDescriptor = GRID) -> HistogramCalibrator:
    found = calibrator_for(grid)
    assert isinstance(found, HistogramCalibrator)
    return found


def collected(*batches: torch.Tensor, grid: QuantDescriptor = GRID) -> HistogramCalibrator:
    found = calibrator(grid)
    for batch in batches:
        found.collect(batch)
    return found


def error_of(x: torch.Tensor, found: DataRange, grid: QuantDescriptor = GRID) -> float:
    low, high = (0, 255) if grid.unsigned else (-128, 127)
    scale, zero_point = affine_parameters(found.amin, found.amax, low, high)
    back = dequantize_affine(quantize_affine(x, scale, zero_point, low, high), scale, zero_point)
    return float((back - x).double().square().mean())


@methods
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_range_does_not_depend_on_order_and_batches(method, parts):
    whole = collected(DATA).compute_range(method)
    pieces = collected(*DATA[torch.randperm(len(DATA))].chunk(parts)).compute_range(method)
    assert torch.equal(whole.amax, pieces.amax)
    assert torch.equal(whole.amin, pieces.amin)


@methods
def test_merged_calibrators_have_seen_both(method):
    first, second = collected(DATA[:1000]), collected(DATA[1000:])
    first.merge(second)
    assert torch.equal(first.compute_range(method).amin, collected(DATA).compute_range(method).amin)


@pytest.mark.parametrize("kind", ["max", "histogram"])
def test_max_is_exact(kind):
    found = calibrator_for(GRID.replace(calib_method=kind))
    found.collect(DATA)
    ends = found.compute_range("max")
    assert (ends.amax, ends.amin) == (9.0, -4.0)
    assert found.compute_amax("max") == 9.0
    assert collected(-DATA).compute_amax("max") == 9.0


@pytest.mark.parametrize("x", [[1.0, 2.0], [-1.0, -2.0], [0.0]], ids=str)
def test_every_range_holds_0(x):
    ends = collected(torch.tensor(x)).compute_range("max")
    assert ends.amin <= 0 <= ends.amax


@given(percentile=st.floats(50, 99.9))
def test_a_percentile_leaves_half_of_the_rest_beyond_each_end(percentile):
    ends = collected(DATA).compute_range("percentile", percentile=percentile)
    share, width = (100 - percentile) / 200, 16 / 4096  # of a bin
    for beyond, end in ((DATA, ends.amax), (-DATA, -ends.amin)):
        assert (beyond > end).double().mean() <= share
        assert end == 0 or (beyond > end - 1.001 * width).double().mean() >= share


def test_the_error_is_that_of_quantized_data():
    halves = Halves.of(DATA)
    for amax, amin in ((9.0, -4.0), (3.0, -0.2), (1.0, -1.0)):
        found = DataRange(torch.tensor([amax]), torch.tensor([amin]))
        assert float(affine_error(halves, GRID, found)) == pytest.approx(error_of(DATA, found), rel=0.02)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_mse_is_about_as_good_as_the_best_of_a_dense_search(num_bits):
    grid = GRID.replace(num_bits=num_bits)
    halves, ends = Halves.of(DATA), collected(DATA, grid=grid).compute_range("mse")
    found = float(affine_error(halves, grid, DataRange(ends.amax.reshape(1), ends.amin.reshape(1))))
    shares = torch.arange(1, 101) / 100
    dense = [
        float(affine_error(halves, grid, DataRange(torch.tensor([9.0 * a]), torch.tensor([-4.0 * b]))))
        for a in shares[::2]
        for b in shares[::4]
    ]
    assert found <= 1.02 * min(dense)


def test_ranges_are_per_channel():
    x = torch.stack([DATA, -2 * DATA])
    ends = collected(x, grid=GRID.replace(axis=0)).compute_range("max")
    assert ends.amax.tolist() == [[9.0], [8.0]]
    assert ends.amin.tolist() == [[-4.0], [-18.0]]


@pytest.mark.parametrize(("axis", "rows"), [(0, 2), ((0, 1), 6), ((1, 0), 6)])
def test_each_nonzero_value_is_in_one_half(axis, rows):
    x = torch.tensor([[1.0, -2.0, 0.0], [-4.0, -5.0, 6.0]])
    halves = Halves.of(x, axis)
    positive, negative = ((half > 0).sum(1) for half in (x.reshape(rows, -1), -x.reshape(rows, -1)))
    assert torch.equal(halves.histogram.count, torch.cat([positive, negative]))
    assert halves.count.tolist() == [6 // rows] * rows


def test_halves_of_integers_are_those_of_their_values():
    x = torch.tensor([-128, 5], dtype=torch.int8)
    assert [end.item() for end in Halves.of(x).ends] == [5.0, 128.0]


def test_negative_values_are_no_error_on_an_affine_unsigned_grid():
    assert collected(torch.tensor([-1.0, 1.0])).compute_range("max").amin == -1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["max", "histogram"])
def test_nan_and_inf_are_refused(kind, bad):
    found = calibrator_for(GRID.replace(calib_method=kind))
    found.collect(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError, match="the data held (1 NaN and 0|0 NaN and 1) Inf"):
        found.compute_range("max")


@pytest.mark.gpu
@methods
def test_a_gpu_gives_the_same_range(method):
    """Parallel float sums on a GPU differ from run to run, so the search runs on the CPU."""
    x = torch.randn(16, 3_000)
    on_gpu = find_range(Halves.of(x.cuda(), 0), GRID, method)
    assert all(end.is_cuda for end in on_gpu)
    assert [end.tolist() for end in on_gpu] == [end.tolist() for end in find_range(Halves.of(x, 0), GRID, method)]


def test_entropy_is_for_symmetric_ranges():
    with pytest.raises(InvalidValueError, match="affine calibration method: expected one of .*, got 'entropy'"):
        collected(DATA).compute_range("entropy")


def test_without_data_there_is_no_range():
    assert calibrator().compute_range("mse") is calibrator().compute_amax() is None


def test_ranges_of_blocks_are_those_of_max():
    grid = QuantDescriptor(4, block_size=2)
    found = MaxCalibrator()
    found.descriptor = grid
    found.collect(torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0]]))
    assert found.compute_amax().tolist() == [[3.0, 2.0, 4.0]]
