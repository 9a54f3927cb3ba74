"""Float formats, and scales that are stored in a format of their own."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakequant import arithmetic
from fakequant.descriptor_fields import FLOAT_FORMATS

FORMATS = {(4, 3): ml_dtypes.float8_e4m3fn, (5, 2): ml_dtypes.float8_e5m2, (2, 1): ml_dtypes.float4_e2m1fn}
formats = pytest.mark.parametrize(("num_bits", "dtype"), FORMATS.items(), ids=[d.__name__ for d in FORMATS.values()])

scales_of = pytest.mark.parametrize(
    "scale_of",
    [lambda amax: arithmetic.power_of_two_scale(amax, 8), lambda amax: arithmetic.e8m0_scale(amax, 8)],
    ids=["power_of_two", "e8m0"],
)

ranges = st.floats(2.0**-23, 2.0**126, width=32)


def highest(dtype: type) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def rounded(x: np.ndarray, dtype: type) -> np.ndarray:
    return np.clip(x, -highest(dtype), highest(dtype)).astype(dtype).astype(np.float32)


@formats
def test_the_largest_value_is_that_of_the_format(num_bits, dtype):
    assert FLOAT_FORMATS[num_bits].max == highest(dtype)


@formats
def test_every_half_precision_value_rounds_as_ml_dtypes_does(num_bits, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = x[np.isfinite(x)]
    values = arithmetic.quantize_float(torch.from_numpy(x), torch.tensor(1.0), num_bits).numpy()
    assert np.array_equal(values, rounded(x, dtype))


@formats
def test_a_float_grid_is_scaled(num_bits, dtype):
    x, scale = torch.randn(1000), np.float32(0.037)
    values = arithmetic.quantize_float(x, torch.tensor(scale), num_bits).numpy()
    assert np.array_equal(values, rounded(x.numpy() / scale, dtype) * scale)


@formats
@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_largest_value_a_float_grid_saturates(num_bits, dtype, sign):
    values = arithmetic.quantize_float(torch.tensor([1e6, torch.inf]) * sign, torch.tensor(1.0), num_bits)
    assert values.tolist() == [sign * highest(dtype)] * 2


@formats
def test_a_float_grid_keeps_nan(num_bits, dtype):
    assert arithmetic.quantize_float(torch.tensor(torch.nan), torch.tensor(1.0), num_bits).isnan()


def test_ties_of_fp4_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = arithmetic.quantize_float(ties, torch.tensor(1.0), (2, 1))
    assert values.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


# Powers of two


@pytest.mark.parametrize(
    ("amax", "num_bits", "unsigned", "exponent"),
    [
        (1.0, 8, False, -7),
        (math.nextafter(1.0, 2), 8, False, -7),  # 1.0 in float32
        (1.0000001192092896, 8, False, -6),
        (0.75, 8, False, -7),
        (0.5, 8, False, -8),
        (1.0, 8, True, -8),
        (100.0, 4, False, 4),
        (3.0, 2, False, 1),
        (2.0**127, 1, False, 127),
        (3.4e38, 1, False, 127),
    ],
)
def test_power_of_two_scale_rounds_the_range_up(amax, num_bits, unsigned, exponent):
    assert arithmetic.power_of_two_scale(torch.tensor(amax), num_bits, unsigned).item() == 2.0**exponent


@given(exponent=st.integers(-23, 127), num_bits=st.integers(2, 16))
def test_a_power_of_two_is_its_own_range(exponent, num_bits):
    scale = arithmetic.power_of_two_scale(torch.tensor(2.0**exponent), num_bits)
    assert scale.item() * 2 ** (num_bits - 1) == 2.0**exponent


@given(amax=ranges, num_bits=st.integers(2, 16), unsigned=st.booleans())
def test_a_power_of_two_scale_is_the_least_that_holds_the_range(amax, num_bits, unsigned):
    levels = 2 ** (num_bits if unsigned else num_bits - 1)
    scale = arithmetic.power_of_two_scale(torch.tensor(amax), num_bits, unsigned).item()
    assert math.frexp(scale)[0] == 0.5
    assert scale * levels / 2 < amax <= scale * levels


@scales_of
def test_a_dead_range_has_the_scale_of_every_dead_range(scale_of):
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-24, 2.0**-23])
    assert (scale_of(amax) == arithmetic.DEAD_SCALE).tolist() == [True, True, True, False]


@scales_of
def test_nan_is_no_power_of_two(scale_of):
    assert scale_of(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def test_infinity_is_no_power_of_two_scale():
    assert arithmetic.power_of_two_scale(torch.tensor(torch.inf), 8) == torch.inf


# MX


@pytest.mark.parametrize(
    ("amax", "largest_exponent", "exponent"),
    [
        (448.0, 8, 0),
        (1.0, 8, -8),
        (1.999, 8, -8),
        (2.0, 8, -7),
        (57344.0, 15, 0),
        (6.0, 2, 0),
        (7.9, 2, 0),
        (8.0, 2, 1),
        (127.0, 6, 0),
        (1.984375, 6, -6),
    ],
)
def test_e8m0_scale_is_that_of_the_specification(amax, largest_exponent, exponent):
    assert arithmetic.e8m0_scale(torch.tensor(amax), largest_exponent).item() == 2.0**exponent


@given(amax=ranges, largest_exponent=st.sampled_from([2, 6, 8, 15]))
def test_an_e8m0_scale_survives_a_trip_through_e8m0(amax, largest_exponent):
    scale = arithmetic.e8m0_scale(torch.tensor(amax), largest_exponent).numpy()
    assert scale == scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32) > 0


@given(amax=ranges, num_bits=st.sampled_from(list(FORMATS)))
def test_the_largest_of_a_block_falls_into_the_upper_binade_of_the_elements(amax, num_bits):
    largest = FLOAT_FORMATS[num_bits].largest_exponent
    scaled = amax / arithmetic.e8m0_scale(torch.tensor(amax), largest).item()
    binade = 2.0 ** (math.frexp(highest(FORMATS[num_bits]))[1] - 1)
    assert binade <= scaled < 2 * binade


def test_an_infinite_block_has_the_largest_scale():
    scales = arithmetic.e8m0_scale(torch.tensor([torch.inf, 3.4e38]), 8)
    assert scales.tolist() == [2.0**119, 2.0**119]


# NVFP4


def test_nvfp4_scales_worked_by_hand():
    # Tensor: 26.88 / 2688 = 0.01. Blocks: 26.88 / 6 / 0.01 = 448; 0.6 / 6 / 0.01 = 10; 1 / 6 / 0.01 = 16.67 -> 16.
    scales = arithmetic.nvfp4_scales(torch.tensor([26.88, 0.6, 1.0]), torch.tensor(26.88))
    assert scales.block.tolist() == [448.0, 10.0, 16.0]
    assert scales.tensor.item() == np.float32(26.88) / np.float32(2688)
    assert torch.equal(scales.scale, scales.block * scales.tensor)


def test_nvfp4_block_scales_are_those_of_ml_dtypes():
    amax = torch.rand(1000) * torch.logspace(-4, 0, 1000)
    scales = arithmetic.nvfp4_scales(amax, amax.max())
    wanted = amax.numpy() / np.float32(6) / scales.tensor.numpy()
    expected = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).clip(2.0**-9)
    assert np.array_equal(scales.block.numpy(), expected)


@pytest.mark.parametrize(("block", "tensor"), [(0.0, 1.0), (1e-9, 1.0), (0.0, 0.0)])
def test_a_dead_nvfp4_block_has_a_positive_scale(block, tensor):
    scales = arithmetic.nvfp4_scales(torch.tensor([block]), torch.tensor(tensor))
    assert scales.block.item() == 2.0**-9
    assert scales.scale.item() > 0


def test_nvfp4_scales_keep_nan():
    scales = arithmetic.nvfp4_scales(torch.tensor([torch.nan, 1.0]), torch.tensor(1.0))
    assert scales.block.isnan().tolist() == [True, False]
