import pytest
import torch

from fakequant.calib import HistogramCalibrator, MaxCalibrator
from fakequant.errors import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize("method", ["entropy", "mse", "percentile", "auto"])
def test_a_method_that_needs_a_histogram_is_refused_with_what_to_use(method):
    with pytest.raises(InvalidValueError, match=rf"got '{method}': .*HistogramCalibrator \(calib_method='histogram'\)"):
        MaxCalibrator(8, None, False).compute_amax(method)


@pytest.mark.parametrize("base", [MaxCalibrator, HistogramCalibrator])
def test_a_calibrator_with_a_compute_amax_of_its_own_is_refused(base):
    """Ranges are read by ``compute_range``: such a method would never be called."""
    with pytest.raises(InvalidTypeError, match="Tenfold: expected a compute_range of its own, got a compute_amax"):
        type("Tenfold", (base,), {"compute_amax": lambda self: 10.0})


def test_amaxs_has_the_range_of_each_batch():
    calibrator = MaxCalibrator(8, 0, False, track_amax=True)
    calibrator.collect(torch.tensor([[1.0], [-4.0]]))
    calibrator.collect(torch.tensor([[3.0], [2.0]]))
    assert [amax.tolist() for amax in calibrator.amaxs] == [[[1.0], [4.0]], [[3.0], [2.0]]]


def test_changing_amaxs_does_not_change_the_calibrator():
    calibrator = MaxCalibrator(8, None, False, track_amax=True)
    calibrator.collect(torch.ones(1))
    calibrator.amaxs[0].zero_()
    assert calibrator.amaxs == [torch.ones(())]


def test_reset_empties_amaxs():
    calibrator = MaxCalibrator(8, None, False, track_amax=True)
    calibrator.collect(torch.ones(1))
    calibrator.reset()
    assert calibrator.amaxs == []


def test_amaxs_without_tracking_is_refused():
    with pytest.raises(InvalidValueError, match="track_amax=True"):
        MaxCalibrator(8, None, False).amaxs  # noqa: B018


def test_merge_appends_amaxs():
    one, other = (MaxCalibrator(8, None, False, track_amax=True) for _ in range(2))
    one.collect(torch.tensor(1.0))
    other.collect(torch.tensor(2.0))
    one.merge(other)
    assert [amax.item() for amax in one.amaxs] == [1.0, 2.0]


def test_str_is_the_ancestors():
    assert str(MaxCalibrator(8, None, False)) == "MaxCalibrator(track_amax=False)"


def test_repr_is_the_ancestors():
    calibrator = MaxCalibrator(8, None, False, track_amax=True)
    assert repr(calibrator) == (
        "MaxCalibrator(num_bits=8 axis=None unsigned=False calib_amax=None track_amax=True amaxs=[])"
    )


def test_merging_one_that_did_not_track_is_refused_and_changes_nothing():
    one, other = MaxCalibrator(8, None, False, track_amax=True), MaxCalibrator(8, None, False)
    other.collect(torch.ones(1))
    with pytest.raises(InvalidValueError, match="track_amax=True"):
        one.merge(other)
    assert one.compute_amax() is None
