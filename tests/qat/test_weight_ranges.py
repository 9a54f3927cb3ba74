import numpy as np
import pytest
import torch
from torch import nn

import fakequant
from fakequant import QuantDescriptor, Rule, preset
from fakequant.calib import MaxCalibrator, register_calibrator
from fakequant.calib.calibrator import CALIBRATORS
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError
from fakequant.qat import follow_ranges, reestimate_weights

CHANNEL4 = QuantDescriptor(4, axis=0, narrow_range=True)


def conv(weight: QuantDescriptor = CHANNEL4, calibrated: bool = True) -> nn.Module:
    model = nn.Conv2d(3, 5, 3)
    fakequant.quantize(model, preset("int8") + Rule("", weight=weight))
    if calibrated:
        fakequant.calibrate(model, [torch.randn(1, 3, 5, 5)], progress=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(5, 3, 3, 3))
    return model


def rows(model: nn.Module) -> np.ndarray:
    return model.weight.detach().numpy().reshape(5, -1).astype(np.float64)


def error(rows: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """The squared error of each row on a grid of 15 levels."""
    step = amax.reshape(-1, 1) / 7
    return ((np.clip(np.rint(rows / step), -7, 7) * step - rows) ** 2).sum(1)


@pytest.mark.parametrize("calibrated", [True, False])
def test_max_is_the_largest_magnitude_of_each_channel(calibrated):
    model = conv(calibrated=calibrated)
    reestimate_weights(model)
    assert model.weight_quantizer.amax.shape == (5, 1, 1, 1)
    np.testing.assert_array_equal(model.weight_quantizer.amax.flatten(), np.abs(rows(model)).max(1).astype(np.float32))


def test_mse_is_as_good_as_any_range_tried():
    model = conv()
    reestimate_weights(model, "mse")
    weight = rows(model)
    tried = np.abs(weight).max(1) * np.linspace(0.3, 1, 200)[:, None]
    least = np.min([error(weight, amax) for amax in tried], 0)
    found = error(weight, model.weight_quantizer.amax.numpy())
    assert (found <= 1.02 * least).all()
    assert (found < 0.98 * error(weight, np.abs(weight).max(1))).any()


def test_both_ends_of_an_affine_range_are_taken():
    model = conv(QuantDescriptor(4, axis=0, affine=True))
    reestimate_weights(model)
    np.testing.assert_array_equal(model.weight_quantizer.amax.flatten(), rows(model).max(1).astype(np.float32))
    np.testing.assert_array_equal(model.weight_quantizer.amin.flatten(), rows(model).min(1).astype(np.float32))


def test_a_known_range_changes_in_its_own_memory():
    model = conv()
    before = model.weight_quantizer.amax
    reestimate_weights(model)
    assert model.weight_quantizer.amax is before


def test_a_range_of_another_shape_is_replaced():
    model = conv()
    model.weight_quantizer.amax = None
    model.weight_quantizer.amax = 3.0
    reestimate_weights(model)
    assert model.weight_quantizer.amax.shape == (5, 1, 1, 1)


@pytest.mark.parametrize(
    "grid",
    [
        QuantDescriptor(4, amax=9.0),
        QuantDescriptor(4, learn_amax="lsq"),
        QuantDescriptor(4, dynamic=True),
        QuantDescriptor(2, scheme="twn"),
    ],
    ids=["fixed", "learned", "dynamic", "scheme"],
)
def test_ranges_that_come_from_elsewhere_stay(grid):
    model = conv(grid)
    before = model.weight_quantizer.amax
    before = None if before is None else before.detach().clone()
    reestimate_weights(model)
    assert model.weight_quantizer.amax == before


def test_activations_stay():
    model = conv()
    before = model.input_quantizer.amax.clone()
    reestimate_weights(model)
    assert torch.equal(model.input_quantizer.amax, before)


def test_every_weight_of_a_layer_is_taken():
    model = nn.LSTM(3, 2)
    fakequant.quantize(model, preset("int8") + Rule("", type="LSTM"))
    reestimate_weights(model)
    for name, quantizer in model.weight_quantizers():
        assert quantizer.amax.max() == getattr(model, name).abs().max()


def test_a_bad_weight_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fakequant.quantize(model)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="1._weight_quantizer: the data held 1 NaN"):
        reestimate_weights(model)
    assert model[0].weight_quantizer.amax is None


@pytest.fixture
def max_and_one(monkeypatch):
    """A calibrator of a user's."""
    monkeypatch.setattr("fakequant.calib.calibrator.CALIBRATORS", dict(CALIBRATORS))

    @register_calibrator("max_and_one")
    class MaxAndOne(MaxCalibrator):
        def compute_range(self, method=None, *, percentile=99.99):
            found = super().compute_range(method)
            return found and found._replace(amax=found.amax + 1)


def test_a_calibrator_of_ones_own_takes_the_range(max_and_one):
    model = conv(CHANNEL4.replace(calib_method="max_and_one"), calibrated=False)
    reestimate_weights(model, "mse")
    expected = np.abs(rows(model)).max(1).astype(np.float32) + 1
    np.testing.assert_array_equal(model.weight_quantizer.amax.flatten(), expected)


@pytest.mark.parametrize("method", ["best", "", "auto"])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(InvalidValueError, match=f"^method: expected one of .* for weights, got {method!r}"):
        reestimate_weights(conv(), method)


def test_a_method_that_is_no_str_is_refused():
    with pytest.raises(InvalidTypeError, match="^method: expected one of .* for weights, got None"):
        reestimate_weights(conv(), None)


def test_lsq_is_for_ranges_that_are_learned():
    with pytest.raises(InvalidValueError, match="expected one for ranges that are not learned, got 'lsq'"):
        reestimate_weights(conv(), "lsq")


def test_a_layer_without_elements_has_no_range():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Linear(0, 2)
    fakequant.quantize(model)
    reestimate_weights(model)
    assert model.weight_quantizer.amax is None


def test_following_activations_go_on():
    model = conv()
    follow_ranges(model)
    reestimate_weights(model)
    assert model.input_quantizer.momentum == 0.01
