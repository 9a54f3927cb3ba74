import pytest
import torch

from fakequant.calib import Histogram, HistogramCalibrator, find_amax
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError


def calibrated(*batches: torch.Tensor, **arguments: object) -> HistogramCalibrator:
    calibrator = HistogramCalibrator(**arguments)
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


@pytest.mark.parametrize("method", ["max", "entropy", "percentile", "mse", "auto"])
def test_every_method_gives_what_find_amax_gives(method):
    x = torch.randn(4, 3, 500)
    amax = calibrated(x[:1], x[1:], axis=1).compute_amax(method, percentile=99)
    expected = find_amax(Histogram.of(x, 1), QuantDescriptor(8), method, percentile=99)
    assert torch.equal(amax, expected.view(1, 3, 1))


@pytest.mark.parametrize(("num_bits", "method"), [(8, "entropy"), ((4, 3), "mse")])
def test_the_method_of_its_own(num_bits, method):
    calibrator = calibrated(torch.randn(5_000) ** 3, num_bits=num_bits)
    assert calibrator.compute_amax() == calibrator.compute_amax(method) < calibrator.compute_amax("max")


def test_unsigned_is_passed_on():
    x = torch.randn(50_000).relu()
    assert calibrated(x).compute_amax("mse") < calibrated(x, unsigned=True).compute_amax("mse")


def test_entropy_on_fp8_is_refused():
    with pytest.raises(InvalidValueError, match="float calibration method"):
        calibrated(num_bits=(4, 3)).compute_amax("entropy")


def test_the_histogram_is_there_to_be_read():
    assert calibrated(torch.ones(3), torch.ones(4)).histogram.count.tolist() == [7]


def test_no_data_has_no_histogram():
    assert calibrated().histogram is None


def test_a_tiny_first_batch_costs_nothing_later():
    calibrator = calibrated(torch.full((3,), 1e-30), torch.ones(3))
    assert calibrator.histogram.counts.shape == (1, 4096)


def test_an_all_zero_first_batch_is_data():
    assert calibrated(torch.zeros(3), torch.ones(3)).histogram.count.tolist() == [6]


def test_computing_twice_gives_the_same():
    calibrator = calibrated(torch.randn(1000))
    assert calibrator.compute_amax() == calibrator.compute_amax()


@pytest.mark.parametrize(
    ("batches", "expected"),
    [([], "calib_bin_edges=None"), ([torch.tensor([0.6])], "calib_bin_edges=[0.000, ..., 1.000](4097)")],
    ids=["no data", "data"],
)
def test_str_is_the_ancestors(batches, expected):
    assert str(calibrated(*batches)) == f"HistogramCalibrator({expected})"


def test_repr_has_the_grid():
    assert repr(calibrated(axis=0)) == "HistogramCalibrator(num_bits=8 axis=0 unsigned=False calib_bin_edges=None)"
