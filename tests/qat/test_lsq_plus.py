import numpy as np
import pytest
import torch
from torch import nn

import fakequant
from fakequant import QuantDescriptor
from fakequant.errors import InvalidValueError
from fakequant.qat import start_lsq_plus


def quantized(**grid: object) -> nn.Module:
    model = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        model.weight.add_(0.1)
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule("", weight=QuantDescriptor(4, **grid)))
    return model


@pytest.mark.parametrize(("axis", "kept"), [(None, 0), (0, 1), ((0, 1), 2), ((0, 1, 2, 3), 4)], ids=str)
def test_the_step_is_the_papers(axis, kept):
    model = quantized(learn_amax="lsq", axis=axis)
    start_lsq_plus(model)
    weight = model.weight.detach().numpy().astype(np.float64)
    weight = weight.reshape(*weight.shape[:kept], -1)
    mean, std = weight.mean(-1), weight.std(-1)
    step = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 2**3
    np.testing.assert_allclose(model.weight_quantizer.scale.detach().reshape(step.shape), step, rtol=1e-6)


def test_it_replaces_a_calibrated_range():
    model = quantized(learn_amax="lsq")
    fakequant.calibrate(model, [torch.randn(1, 3, 5, 5)], progress=False)
    before = model.weight_quantizer.amax.clone()
    start_lsq_plus(model)
    assert model.weight_quantizer.amax != before


def test_a_model_without_learned_weights_is_refused():
    with pytest.raises(InvalidValueError, match='expected a weight with learn_amax="lsq", got none'):
        start_lsq_plus(quantized())


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed():
    model = nn.Sequential(quantized(learn_amax="lsq"), quantized(learn_amax="lsq"))
    model[1].weight.data[0] = torch.nan
    with pytest.raises(InvalidValueError, match="1._weight_quantizer: amax: expected finite values >= 0"):
        start_lsq_plus(model)
    assert not model[0].weight_quantizer.is_calibrated
