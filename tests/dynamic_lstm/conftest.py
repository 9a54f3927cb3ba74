"""ONNX Runtime's DynamicQuantizeLSTM in NumPy, after its source: uni_directional_lstm.cc, rnn_helpers.cc, qmath.h."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

Array = np.ndarray


def on_grid(x: Array) -> Array:
    """Return values on the uint8 grid of DynamicQuantizeLinear."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32(1) if low == high else (high - low) / np.float32(255)
    zero_point = np.rint(np.clip(-low / scale, 0, 255))
    return ((np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale).astype(np.float32)


def weight_on_grid(weight: Array) -> Array:
    """Return a weight [outputs, inputs] on its int8 grid, a range for each output."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(weight / scale) * scale


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def from_ends(x: Array, lengths: Array) -> Array:
    return np.stack([np.concatenate([x[:n, i][::-1], x[n:, i]]) for i, n in enumerate(lengths)], axis=1)


def direction(
    module: nn.LSTM, suffix: str, x: Array, h: Array, c: Array, lengths: Array, shares: list[slice]
) -> tuple[Array, Array, Array]:
    """Return the outputs [T, N, H] and last states of one direction; x is on its grid."""
    h, c, last = h.copy(), c.copy(), np.zeros_like(h)
    w, r = (weight_on_grid(getattr(module, f"weight_{of}_{suffix}").detach().numpy()) for of in ("ih", "hh"))
    b = 0.0
    if module.bias:
        b = sum(getattr(module, f"bias_{of}_{suffix}").detach().numpy() for of in ("ih", "hh"))
    outputs = np.zeros((*x.shape[:2], module.hidden_size), np.float32)
    for t in range(lengths.max()):
        for share in shares:
            i, f, g, o = np.split(x[t, share] @ w.T + on_grid(h[share]) @ r.T + b, 4, axis=1)
            inside = (t < lengths[share])[:, None]
            c[share] = np.where(inside, sigmoid(f) * c[share] + sigmoid(i) * np.tanh(g), c[share])
            h[share] = np.where(inside, sigmoid(o) * np.tanh(c[share]), 0)
            last[share] = np.where(inside, h[share], last[share])
        outputs[t] = h
    return outputs, last, c


def shares_of(batch: int, hidden: int, threads: int) -> list[slice]:
    """Return the sequences that the threads of a session share; each share has ranges of its own."""
    if not (batch > 4 or (batch >= 2 and hidden <= 256)):
        return [slice(0, batch)]
    size = -(-batch // threads)
    return [slice(start, start + size) for start in range(0, batch, size)]


def operators(
    module: nn.LSTM, x: Array, states: tuple[Array, Array] | None = None, lengths: Any = None, threads: int = 1
) -> tuple[Array, Array, Array]:
    """Return output and last states of padded sequences [T, N, features]: one operator a stacked layer."""
    suffixes = ["", "_reverse"][: 2 if module.bidirectional else 1]
    if states is None:
        zeros = np.zeros((module.num_layers * len(suffixes), x.shape[1], module.hidden_size), np.float32)
        states = zeros, zeros
    lengths = np.full(x.shape[1], len(x)) if lengths is None else np.asarray(lengths)
    shares = shares_of(x.shape[1], module.hidden_size, threads)
    hs, cs = [], []
    for index in range(module.num_layers):
        x, outputs = on_grid(x[: lengths.max()]), []
        for suffix in suffixes:
            forward = from_ends(x, lengths) if suffix else x
            h, c = (state[len(hs)] for state in states)
            y, h, c = direction(module, f"l{index}{suffix}", forward, h, c, lengths, shares)
            outputs.append(from_ends(y, lengths) if suffix else y)
            hs.append(h)
            cs.append(c)
        x = np.concatenate(outputs, axis=2)
    return x, np.stack(hs), np.stack(cs)


@pytest.fixture(name="operators", scope="session")
def _operators() -> Callable[..., tuple[Array, Array, Array]]:
    return operators
