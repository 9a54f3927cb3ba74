import pytest
import torch

from fakequant.calib import Histogram, find_amax, search_method
from fakequant.calib.methods import METHODS
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError


def test_a_name_is_registered_once():
    with pytest.raises(InvalidValueError, match="'mse', which is registered"):
        search_method("mse")(METHODS["mse"].search)


@pytest.fixture
def half():
    search_method("half")(lambda histogram, descriptor, percentile: histogram.amax / 2)
    yield "half"
    del METHODS["half"]


def test_a_new_method_is_one_function(half):
    assert find_amax(Histogram.of(torch.tensor([8.0])), QuantDescriptor(8), half).tolist() == [4.0]


def test_a_new_method_takes_part_in_auto(half):
    # Half the range is a bad choice here, so that "auto" tries it and leaves it.
    assert find_amax(Histogram.of(torch.full((9,), 0.75)), QuantDescriptor(8), "auto").tolist() == [0.75]
