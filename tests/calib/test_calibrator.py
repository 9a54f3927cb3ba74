"""One battery for every registered calibrator."""

import copy
import pickle

import pytest
import torch

from fakequant.calib import Calibrator, calibrator_for, register_calibrator
from fakequant.calib.calibrator import CALIBRATORS
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidValueError

pytestmark = pytest.mark.parametrize("name", CALIBRATORS)


def calibrated(name: str, *batches: torch.Tensor, **fields: object) -> Calibrator:
    calibrator = calibrator_for(QuantDescriptor(8, calib_method=name, **fields))
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


def test_the_descriptor_is_handed_on(name):
    descriptor = calibrated(name, axis=1, narrow_range=True).descriptor
    assert (descriptor.axis, descriptor.narrow_range) == (1, True)


def test_no_data_has_no_range(name):
    assert calibrated(name).compute_amax() is None


def test_an_empty_tensor_is_no_data(name):
    assert calibrated(name, torch.empty(0, 3)).compute_amax() is None


def test_an_empty_tensor_between_batches_changes_nothing(name):
    calibrator = calibrated(name, torch.ones(3, 4), torch.empty(0, 9, 9), axis=0)
    assert calibrator.compute_amax("max").tolist() == [[1.0]] * 3


@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (0, (4, 1, 1)), (-1, (1, 1, 6)), ((0, 1), (4, 5, 1))])
def test_max_is_the_exact_maximum_in_the_kept_shape(name, axis, shape):
    a, b = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    expected = torch.maximum(a, torch.maximum(b, torch.maximum(-a, -b)))
    axes = () if axis is None else tuple(d % 3 for d in (axis if isinstance(axis, tuple) else (axis,)))
    amax = calibrated(name, a, b, axis=axis).compute_amax("max")
    assert torch.equal(amax, expected.amax([d for d in range(3) if d not in axes]).reshape(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_range_is_float32(name, dtype):
    x = torch.randn(100).to(dtype)
    amax = calibrated(name, x).compute_amax("max")
    assert amax.dtype == torch.float32
    assert amax == x.abs().max()


def test_the_range_is_shared_with_nothing(name):
    x = torch.tensor([1.0, 2.0])
    calibrator = calibrated(name, x, axis=0)
    first = calibrator.compute_amax("max")
    calibrator.collect(torch.tensor([5.0, 5.0]))
    x.fill_(9.0)
    assert first.tolist() == [1.0, 2.0]


def test_changing_the_range_does_not_change_the_calibrator(name):
    calibrator = calibrated(name, torch.ones(3))
    calibrator.compute_amax("max").zero_()
    assert calibrator.compute_amax("max") == 1.0


def test_an_all_zero_tensor_has_range_zero(name):
    assert calibrated(name, torch.zeros(4)).compute_amax() == 0.0


def test_reset_forgets(name):
    calibrator = calibrated(name, torch.tensor([torch.nan, 3.0]))
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_reset_forgets_the_shape(name):
    calibrator = calibrated(name, torch.ones(3, 2), axis=0)
    calibrator.reset()
    calibrator.collect(torch.ones(4, 2))
    assert calibrator.compute_amax("max").shape == (4, 1)


def test_another_number_of_channels_is_refused(name):
    calibrator = calibrated(name, torch.ones(3, 2), axis=0)
    with pytest.raises(CalibrationError, match=r"expected \(3, 1\) as in the batches before, got \(4, 1\)"):
        calibrator.collect(torch.ones(4, 2))


def test_nan_and_inf_are_refused_with_their_counts(name):
    calibrator = calibrated(name, torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, -torch.inf, torch.nan]))
    with pytest.raises(CalibrationError, match="2 NaN and 2 Inf"):
        calibrator.compute_amax()


def test_negative_values_on_an_unsigned_grid_are_refused_with_the_minimum(name):
    calibrator = calibrated(name, torch.tensor([1.0, -0.25]), torch.tensor([2.0]), unsigned=True)
    with pytest.raises(CalibrationError, match=r"minimum -0\.25\), which an unsigned grid"):
        calibrator.compute_amax()


def test_negative_zero_on_an_unsigned_grid_is_accepted(name):
    assert calibrated(name, torch.tensor([1.0, -0.0]), unsigned=True).compute_amax("max") == 1.0


def test_an_unknown_method_is_refused_before_there_is_data(name):
    with pytest.raises(InvalidValueError, match="got 'kl'"):
        calibrated(name).compute_amax("kl")


@pytest.mark.parametrize("axis", [None, 0])
def test_merging_is_collecting_all(name, axis):
    a, b, c = torch.randn(3, 50), torch.randn(3, 50) * 7, torch.randn(3, 50)
    one, other = calibrated(name, a, axis=axis), calibrated(name, b, c, axis=axis)
    one.merge(other)
    assert torch.equal(one.compute_amax(), calibrated(name, c, a, b, axis=axis).compute_amax())


def test_merging_keeps_what_was_not_finite(name):
    one = calibrated(name, torch.ones(1))
    one.merge(calibrated(name, torch.tensor([torch.nan])))
    with pytest.raises(CalibrationError, match="1 NaN"):
        one.compute_amax()


def test_merging_one_without_data_changes_nothing(name):
    one = calibrated(name, torch.ones(3))
    one.merge(calibrated(name))
    assert one.compute_amax("max") == 1.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_life_of_its_own(name, copied):
    calibrator = calibrated(name, torch.ones(3))
    copied(calibrator).collect(torch.tensor([7.0]))
    assert calibrator.compute_amax("max") == 1.0


def test_no_gradient_is_kept(name):
    calibrator = calibrated(name, torch.ones(3, requires_grad=True) * 2)
    assert not calibrator.compute_amax("max").requires_grad


def test_a_range_of_data_from_inference_mode_can_be_trained_with(name):
    calibrator = calibrated(name)
    with torch.inference_mode():
        calibrator.collect(torch.ones(2, 3))
    assert not calibrator.compute_amax("max").is_inference()


def test_half_of_the_largest_numbers_do_not_overflow(name):
    assert calibrated(name, torch.full((70_000,), 65504.0, dtype=torch.float16)).compute_amax("max") == 65504.0


def test_a_name_is_registered_once(name):
    with pytest.raises(InvalidValueError, match="which is registered"):
        register_calibrator(name)(CALIBRATORS[name])


def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(InvalidValueError, match=rf"{name}.*got 'entropy'"):
        calibrator_for(QuantDescriptor(8, calib_method="entropy"))
