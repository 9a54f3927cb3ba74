"""One battery for every registered method, then what find_amax adds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakequant.calib import Histogram, find_amax, quantization_error, sqnr_db
from fakequant.calib.magnitudes import magnitudes
from fakequant.calib.methods import METHODS, SearchMethod
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError

INT8, UINT8, FP8 = QuantDescriptor(8), QuantDescriptor(8, unsigned=True), QuantDescriptor((4, 3))
GRIDS = [INT8, UINT8, QuantDescriptor(4), QuantDescriptor(16), FP8]
PAIRS = [
    pytest.param(name, grid, id=f"{name}-{grid.num_bits}{'u' if grid.unsigned else ''}")
    for name in METHODS
    for grid in GRIDS
    if METHODS[name].on_floats or not grid.is_float
]


def tensors() -> list[torch.Tensor]:
    outlier = torch.cat([torch.randn(20_000), torch.tensor([40.0])])
    return [torch.randn(5_000), torch.randn(5_000).relu() * 1e-3, torch.zeros(9), torch.empty(0), outlier]


@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_a_stack_gives_what_each_histogram_gives(method, grid):
    histograms = [Histogram.of(x) for x in tensors()]
    single = torch.cat([find_amax(h, grid, method) for h in histograms])
    assert torch.equal(find_amax(Histogram.stack(histograms), grid, method), single)


@pytest.mark.parametrize(("method", "grid"), [pair for pair in PAIRS if pair.values[0] != "lsq"])
def test_never_above_the_exact_maximum(method, grid):
    h = Histogram.stack([Histogram.of(x) for x in tensors()])
    assert (find_amax(h, grid, method) <= h.amax).all()


@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_a_row_with_values_has_a_positive_range(method, grid):
    h = Histogram.stack([Histogram.of(x) for x in tensors()])
    assert torch.equal(find_amax(h, grid, method) > 0, h.amax > 0)


@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_no_rows_give_no_ranges(method, grid):
    assert find_amax(Histogram.of(torch.empty(0, 3), axis=0), grid, method).shape == (0,)


@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_the_result_is_float32_and_shares_no_memory(method, grid):
    h = Histogram.of(torch.randn(1000))
    before = h.amax
    amax = find_amax(h, grid, method)
    amax.zero_()
    assert amax.dtype == torch.float32
    assert torch.equal(h.amax, before)


@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_the_histogram_is_not_changed(method, grid):
    h = Histogram.of(torch.randn(1000))
    before = h.counts.clone()
    find_amax(h, grid, method)
    assert torch.equal(h.counts, before)


@pytest.mark.parametrize(("method", "grid"), PAIRS)
@settings(max_examples=3)
@given(power=st.integers(-8, 60))
def test_scaling_the_data_by_a_power_of_two_scales_the_range(method, grid, power):
    x = tensors()[-1]
    a, b = (find_amax(Histogram.of(y), grid, method) for y in (x, x * 2.0**power))
    assert torch.equal(a * 2.0**power, b)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_order_and_batches_do_not_matter(method, seed):
    x = tensors()[-1]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, *others = (Histogram.of(part) for part in x[order].split(3_000))
    for other in others:
        first = other.merge(first)
    assert torch.equal(find_amax(first, INT8, method), find_amax(Histogram.of(x), INT8, method))


def test_max_is_the_exact_maximum():
    assert find_amax(Histogram.of(torch.tensor([0.1, -0.7])), INT8, "max").item() == np.float32(0.7)


def test_percentile_is_passed_on():
    h = Histogram.of(torch.arange(1000.0))
    assert find_amax(h, INT8, "percentile", percentile=50).item() < 510


def test_unsigned_entropy_has_twice_the_levels():
    h = Histogram.of(torch.randn(50_000).relu())
    assert find_amax(h, INT8, "entropy").item() != find_amax(h, UINT8, "entropy").item()


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
def test_auto_has_the_least_error_row_by_row(grid):
    h = Histogram.stack([Histogram.of(x) for x in tensors()])
    names = [n for n in METHODS if n != "auto" and (METHODS[n].on_floats or not grid.is_float)]
    errors = [quantization_error(h, find_amax(h, grid, n), magnitudes(grid)) for n in names]
    auto = quantization_error(h, find_amax(h, grid, "auto"), magnitudes(grid))
    assert torch.equal(auto, torch.stack(errors).amin(0))


def test_auto_gives_a_tie_to_max(monkeypatch):
    # Zeros have no error on any grid.
    ones = SearchMethod(lambda h, descriptor, percentile: torch.ones(1), on_floats=False)
    monkeypatch.setitem(METHODS, "entropy", ones)
    assert find_amax(Histogram.of(torch.zeros(3)), INT8, "auto").item() == 0


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(InvalidValueError, match=r"'auto', 'entropy', 'lsq', 'max', 'mse', 'percentile'\], got 'kl'"):
        find_amax(Histogram.of(torch.ones(1)), INT8, "kl")


def test_entropy_on_fp8_is_refused_with_those_that_work():
    with pytest.raises(InvalidValueError, match=r"^float .*'auto', 'max', 'mse', 'percentile'\], got 'entropy'"):
        find_amax(Histogram.of(torch.ones(1)), FP8, "entropy")


def test_sqnr_is_that_of_the_values():
    x = torch.randn(200_000)
    amax = torch.tensor(3.5)
    quantized = (x / (amax / 127)).round().clamp(-127, 127) * (amax / 127)
    expected = 10 * torch.log10(x.square().sum() / (x - quantized).square().sum())
    assert sqnr_db(Histogram.of(x), amax, INT8).item() == pytest.approx(expected.item(), abs=0.05)


def test_sqnr_of_a_row_without_signal_is_infinite():
    assert sqnr_db(Histogram.of(torch.zeros(3)), torch.zeros(1), INT8).item() == torch.inf


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "grid"), PAIRS)
def test_a_gpu_gives_the_same_range(method, grid):
    x = torch.randn(16, 3_000)
    on_gpu = find_amax(Histogram.of(x.cuda(), axis=0), grid, method)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), find_amax(Histogram.of(x, axis=0), grid, method))
