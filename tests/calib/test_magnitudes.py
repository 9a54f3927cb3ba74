import ml_dtypes
import numpy as np
import pytest

from fakequant.calib import magnitudes
from fakequant.descriptor import QuantDescriptor


def test_signed_integers_end_at_the_bound():
    assert magnitudes(QuantDescriptor(8)).tolist() == list(range(128))


def test_unsigned_integers_end_at_the_bound():
    assert magnitudes(QuantDescriptor(8, unsigned=True)).tolist() == list(range(256))


@pytest.mark.parametrize(
    ("num_bits", "dtype"),
    [((4, 3), ml_dtypes.float8_e4m3fn), ((5, 2), ml_dtypes.float8_e5m2), ((2, 1), ml_dtypes.float4_e2m1fn)],
    ids=str,
)
def test_a_float_format_has_every_finite_value(num_bits, dtype):
    bits = 4 if num_bits == (2, 1) else 8
    every = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float32)
    expected = np.unique(np.abs(every[np.isfinite(every)]))
    assert magnitudes(QuantDescriptor(num_bits)).tolist() == expected.tolist()
