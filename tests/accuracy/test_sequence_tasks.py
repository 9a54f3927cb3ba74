"""What integers cost a trained LSTM and GRU."""

import sys
from pathlib import Path

import pytest
from torch import nn

import fakequant as fq

# Tests are imported without their folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

import sequence_tasks


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_int8_is_within_half_a_point_of_float(layer):
    found = sequence_tasks.accuracies(layer)
    assert found.of_float > 97
    assert found.after_calibration > found.of_float - 0.5
    assert found.after_training > found.of_float - 0.5
    assert found.in_file == found.after_training


@pytest.mark.slow
def test_a_dynamic_lstm_is_within_half_a_point_of_float():
    found = sequence_tasks.accuracies(nn.LSTM, fq.preset("dynamic-lstm"))
    assert found.after_calibration > found.of_float - 0.5
    assert found.after_training > found.of_float - 0.5
    assert found.in_file == pytest.approx(found.after_training, abs=0.1)  # threads share the batch
