import numpy as np
import pytest
import scipy.special
import torch

from fakequant.calib import BINS, Histogram, entropy


def divergence(h: np.ndarray, i: int, levels: int) -> float:
    p = h[:i].copy()
    p[-1] += h[i:].sum()
    filled = np.flatnonzero(h[:i])
    group = filled * levels // i
    mean = np.bincount(group, h[filled]) / np.maximum(np.bincount(group), 1)
    q = np.zeros(i)
    q[filled] = mean[group]
    return np.inf if q.sum() == 0 else scipy.special.rel_entr(p / p.sum(), q / q.sum()).sum()


def oracle(histogram: Histogram, levels: int) -> np.float32:
    h = histogram.counts[0].numpy().astype(np.float64)
    h[0] = h[1]
    used = np.flatnonzero(h)[-1] + 1
    best, least = None, np.inf
    for i in range(levels, used + 1):
        kl = divergence(h, i, levels)
        if kl <= least:
            best, least = i, kl
    return np.float32(min(best * histogram.width.item(), histogram.amax.item()))


def test_it_is_the_oracles_threshold(values):
    h = Histogram.of(values)
    levels = 128 if len(values) % 2 else 256
    assert entropy(h, levels).item() == oracle(h, levels)


@pytest.mark.parametrize("levels", [2, 8, 128, 2048])
def test_every_number_of_levels_works(levels):
    h = Histogram.of(torch.cat([torch.randn(20_000), torch.tensor([16.5])]))
    assert entropy(h, levels).item() == oracle(h, levels)


def test_zeros_do_not_matter():
    x = torch.randn(10_000)
    assert torch.equal(
        entropy(Histogram.of(x), 128), entropy(Histogram.of(torch.cat([x, torch.zeros(1_000_000)])), 128)
    )


def test_an_outlier_is_clipped():
    h = Histogram.of(torch.cat([torch.randn(100_000), torch.tensor([50.0])]))
    assert 3 < entropy(h, 128).item() < 8


@pytest.mark.parametrize("levels", [BINS, 2 * BINS])
def test_no_fewer_levels_than_bins_is_the_exact_maximum(levels):
    assert entropy(Histogram.of(torch.tensor([0.1, 0.3])), levels).item() == np.float32(0.3)


def test_fewer_used_bins_than_levels_is_the_exact_maximum():
    tiny = 2.0**-126  # the smallest bin width: 50 bins are in use
    h = Histogram.of(torch.tensor([50 * tiny, 1.5 * tiny]))
    assert entropy(h, 128).item() == 50 * tiny


def test_rows_with_few_used_bins_do_not_disturb_the_others():
    few, many = Histogram.of(torch.tensor([50 * 2.0**-126])), Histogram.of(torch.randn(10_000))
    assert torch.equal(entropy(Histogram.stack([few, many]), 128), torch.cat([few.amax, entropy(many, 128)]))


@pytest.mark.parametrize("ones", [1, 3, 7, 10, 999, 12_345])
@pytest.mark.parametrize("threes", [1, 5, 100, 77_777])
def test_of_equal_divergences_the_last_wins(ones, threes):
    # Keeping the ones alone puts everything into one bin, so that P = Q; keeping all has P = Q as well.
    h = Histogram.of(torch.cat([torch.full((ones,), 1.0), torch.full((threes,), 3.0)]))
    assert entropy(h, 128).item() == 3.0
