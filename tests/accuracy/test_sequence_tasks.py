"""What int8 costs a trained LSTM and GRU."""

import sys
from pathlib import Path

import pytest
from torch import nn

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
