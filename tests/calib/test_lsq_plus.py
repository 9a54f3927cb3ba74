import numpy as np
import pytest
import torch
from torch import nn

import fakequant
from fakequant.calib import LsqPlusCalibrator, calibrator_for
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidValueError


def start(x: torch.Tensor, **grid: object) -> np.ndarray:
    calibrator = calibrator_for(QuantDescriptor(4, calib_method="lsq+", **grid))
    calibrator.collect(x)
    return calibrator.compute_amax().numpy()


def test_the_step_is_the_papers():
    x = torch.randn(1000) + 0.3
    mean, std = x.double().mean(), x.double().std(correction=0)
    step = max(abs(mean - 3 * std), abs(mean + 3 * std)) / 2**3
    np.testing.assert_allclose(start(x) / 7, step, rtol=1e-6)


def test_each_channel_has_its_own():
    x = torch.randn(3, 5, 4)
    expected = np.concatenate([start(x[:, i]).reshape(1) for i in range(5)])
    np.testing.assert_allclose(start(x, axis=1).reshape(-1), expected, rtol=1e-6)


def test_merged_calibrators_have_seen_both():
    first, second, whole = (LsqPlusCalibrator(4) for _ in range(3))
    x = torch.randn(100)
    for calibrator, part in ((first, x[:30]), (second, x[30:]), (whole, x)):
        calibrator.collect(part)
    first.merge(second)
    torch.testing.assert_close(first.compute_amax(), whole.compute_amax())


def test_without_data_there_is_no_range():
    calibrator = LsqPlusCalibrator(4)
    calibrator.collect(torch.ones(3))
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_nan_is_refused():
    calibrator = LsqPlusCalibrator(4)
    calibrator.collect(torch.tensor([1.0, torch.nan]))
    with pytest.raises(CalibrationError, match="the data held NaN or Inf"):
        calibrator.compute_amax()


@pytest.mark.parametrize("grid", [{"affine": True}, {"block_size": 2}], ids=str)
def test_other_grids_are_refused(grid):
    with pytest.raises(InvalidValueError, match="expected a symmetric integer grid without blocks"):
        start(torch.ones(4), **grid)


def test_calibrate_starts_weights_there():
    model = nn.Linear(8, 4)
    recipe = fakequant.preset("int8") + fakequant.Rule("", weight=QuantDescriptor(4, learn_amax="lsq", axis=0))
    fakequant.quantize(model, recipe)
    fakequant.calibrate(model, [torch.randn(2, 8)], "mse", weight_method="lsq+", progress=False)
    np.testing.assert_allclose(model.weight_quantizer.amax.detach(), start(model.weight, axis=0), rtol=1e-6)
