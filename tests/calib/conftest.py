"""A hundred tensors of the kinds that networks produce, and one thread for everything here."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

_KINDS = ("gaussian", "laplace", "relu", "heavy", "uniform", "sparse")
_SEEDS = range(17)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these many small sums ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _draw(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    if kind == "gaussian":
        return rng.normal(size=size)
    if kind == "laplace":
        return rng.laplace(size=size)
    if kind == "relu":
        return np.maximum(rng.normal(-0.5, size=size), 0)
    if kind == "heavy":
        return rng.standard_t(2, size=size)
    if kind == "uniform":
        return rng.uniform(-1, 1, size=size)
    return rng.normal(size=40).round(2)[rng.integers(0, 40, size)]


@pytest.fixture(params=[f"{kind}-{seed}" for kind in _KINDS for seed in _SEEDS])
def values(request: pytest.FixtureRequest) -> torch.Tensor:
    """float32 [n]. The maximum is a little above a power of two, which keeps the slow oracles at 2100 to 2400 bins."""
    kind, seed = request.param.split("-")
    rng = np.random.default_rng([_KINDS.index(kind), int(seed)])
    x = _draw(kind, rng, size=int(rng.integers(2_000, 50_000)))
    top = rng.uniform(1.02, 1.15) * 2.0 ** rng.integers(-6, 6)
    return torch.from_numpy((x / np.abs(x).max() * top).astype(np.float32))
