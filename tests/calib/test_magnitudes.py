import torch

from fakequant.calib import magnitudes
from fakequant.descriptor import QuantDescriptor


def test_signed_integers_end_at_the_bound():
    assert magnitudes(QuantDescriptor(8)).tolist() == list(range(128))


def test_unsigned_integers_end_at_the_bound():
    assert magnitudes(QuantDescriptor(8, unsigned=True)).tolist() == list(range(256))


def test_fp8_has_every_value_that_float8_has():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert magnitudes(QuantDescriptor((4, 3))).tolist() == sorted({abs(v) for v in every.tolist() if v == v})
