import numpy as np
import pytest
import torch

from fakequant.arithmetic import bounds_of, grid_parameters, quantize
from fakequant.calib import BINS, Histogram, find_amax, magnitudes, mse, quantization_error, signal_power
from fakequant.descriptor import QuantDescriptor

FP8 = QuantDescriptor((4, 3))


def oracle(histogram: Histogram, round_to_grid, high: float) -> np.float32:
    """Try every candidate with the direct sum; ``round_to_grid`` rounds values in units of the scale."""
    counts, exact = histogram.counts[0].numpy(), histogram.amax.item() / histogram.width.item()
    used = np.flatnonzero(counts)
    counts, centers = counts[used], used + 0.5
    candidates = np.append(np.arange(1, int(exact) + 1), exact)
    errors = []
    for scale in candidates / high:
        quantized = round_to_grid(np.minimum(centers / scale, high)) * scale
        errors.append((counts * (centers - quantized) ** 2).sum())
    return np.float32(candidates[np.argmin(errors)] * histogram.width.item())


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to 4 significant bits, and to multiples of 2**-9 below 2**-6."""
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(x, 2.0**-20))), -6) - 3)
    return np.rint(x / step) * step


def test_it_is_the_oracles_range(values):
    h = Histogram.of(values)
    high = 127 if len(values) % 2 else 255
    assert mse(h, torch.arange(high + 1.0)).item() == oracle(h, np.rint, high)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 10])
def test_every_number_of_bits_works(bits):
    h = Histogram.of(torch.cat([torch.randn(20_000), torch.tensor([16.5])]))
    grid = magnitudes(QuantDescriptor(bits))
    assert mse(h, grid).item() == oracle(h, np.rint, float(grid[-1]))


@pytest.mark.parametrize("seed", range(8))
def test_fp8_is_the_oracles_range(seed):
    generator = torch.Generator().manual_seed(seed)
    h = Histogram.of(torch.randn(5_000, generator=generator) ** 3)
    assert mse(h, magnitudes(FP8)).item() == oracle(h, round_e4m3, 448.0)


@pytest.mark.parametrize("bits", [13, 16])
def test_a_grid_finer_than_the_bins_weighs_clipping_against_a_twelfth_of_the_step_squared(bits):
    h = Histogram.of(torch.cat([torch.randn(3_000_000), torch.tensor([20.0])]))
    high = 2.0**bits - 1
    counts, width = h.counts[0].numpy(), h.width.item()
    exact, centers = h.amax.item() / width, np.arange(BINS) + 0.5
    candidates = np.append(np.arange(1, int(exact) + 1), exact)
    errors = [
        (counts * np.where(centers > i, centers - i, 0) ** 2).sum() + counts.sum() * (i / high) ** 2 / 12
        for i in candidates
    ]
    assert mse(h, torch.arange(2.0**bits)).item() == np.float32(candidates[np.argmin(errors)] * width)


def test_beyond_float64_integers_the_range_is_the_same():
    h = Histogram.of(torch.randn(10_000))
    huge = Histogram(h.counts << 22, h.exponent, h.extremes)
    assert torch.equal(mse(h, torch.arange(128.0)), mse(huge, torch.arange(128.0)))


@pytest.mark.parametrize("descriptor", [QuantDescriptor(8), QuantDescriptor(4, unsigned=True), FP8], ids=str)
def test_quantization_error_is_that_of_the_bin_centres(descriptor):
    h = Histogram.of(torch.randn(5_000).abs())
    centers = (np.arange(BINS) + 0.5) * h.width.item()
    grid = magnitudes(descriptor).numpy().astype(np.float64)
    scale = np.float64(np.float32(2.5) / np.float32(grid[-1]))
    nearest = np.abs(centers[:, None] - grid * scale).min(1)
    expected = (h.counts[0].numpy() * nearest**2).sum() / 5_000
    error = quantization_error(h, torch.tensor(2.5), magnitudes(descriptor))
    np.testing.assert_allclose(error.item(), expected, rtol=1e-12)


def test_quantization_error_is_close_to_that_of_the_values():
    x = torch.randn(200_000)
    scale = x.abs().max() / 127
    expected = (x - (x / scale).round() * scale).square().mean()
    error = quantization_error(Histogram.of(x), x.abs().max(), torch.arange(128.0))
    assert error.item() == pytest.approx(expected.item(), rel=0.01)


def test_quantization_error_takes_the_kept_shape():
    h = Histogram.of(torch.randn(3, 50), axis=0)
    grid = torch.arange(128.0)
    assert torch.equal(quantization_error(h, h.amax.view(3, 1, 1), grid), quantization_error(h, h.amax, grid))


def test_signal_power_is_the_mean_square():
    x = torch.randn(3, 50_000, dtype=torch.float64)
    np.testing.assert_allclose(signal_power(Histogram.of(x, axis=0)), x.square().mean(1), rtol=1e-4)


@pytest.mark.parametrize("x", [torch.empty(0), torch.zeros(5)], ids=["empty", "zeros"])
def test_nothing_has_no_error_and_no_power(x):
    h = Histogram.of(x)
    assert quantization_error(h, torch.zeros(1), torch.arange(128.0)).item() == 0
    assert signal_power(h).item() == 0


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_power_of_two_scales_are_searched_among_powers_of_two(num_bits, unsigned):
    grid = QuantDescriptor(num_bits, scale_format="power_of_two", unsigned=unsigned)
    x = torch.cat([torch.randn(20000).abs(), torch.tensor([13.0])])
    scale = grid_parameters(grid, find_amax(Histogram.of(x), grid, "mse")).scale
    low, high = bounds_of(grid)

    def error(exponent: int) -> float:
        step = torch.tensor(2.0**exponent)
        return float((quantize(x, step, low, high) * step - x).double().square().mean())

    best = min(range(-12, 6), key=error)
    assert float(scale) == 2.0**best
