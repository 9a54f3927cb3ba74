"""What quantization does to the outputs and to each tensor, measured on batches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fakequant.calib.mse import decibels
from fakequant.collecting import collecting
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers
from fakequant.qat.checks.report import Finding, TensorError

_LEAST_DB = 3.0
"""Twice as much signal as noise."""


class Noise:
    """Signal and noise, summed over pairs of tensors.

    Attributes:
        is_finite: whether all that was given was.
        count: elements that were given.
    """

    def __init__(self) -> None:
        self.is_finite = True
        self.count = 0
        self._signal = torch.zeros((), dtype=torch.float64)
        self._noise = torch.zeros((), dtype=torch.float64)

    def add(self, signal: Tensor, noisy: Tensor) -> None:
        """Take in a tensor, and what became of it."""
        expected, got = signal.detach().to("cpu", torch.float64), noisy.detach().to("cpu", torch.float64)
        self.is_finite &= bool(expected.isfinite().all() & got.isfinite().all())
        self.count += expected.numel()
        self._signal += expected.square().sum()
        self._noise += (got - expected).square().sum()

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in dB; NaN where anything was not finite."""
        return float(decibels(self._signal, self._noise))


class Run:
    """The quantized model and the float model on the same batches, in eval mode.

    Attributes:
        num_batches: how many.
        outputs: by their place in what the model returns.
        quantizers: by full name, those that were called, in order of execution.
        apart: the outputs whose shapes differ between the two.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
        self.num_batches = 0
        self.outputs: dict[str, Noise] = {}
        self.quantizers: dict[str, Noise] = {}
        self.apart: set[str] = set()
        self._weights = {name for name, quantizer in named_quantizers(model) if quantizer.is_weight}
        with evaluating(model):
            for batch in batches:
                with collecting(model, {}):
                    expected = _tensors(forward(model, batch))
                with self._listening(model):
                    self._compare(expected, _tensors(forward(model, batch)))
                self.num_batches += 1

    @property
    def is_empty(self) -> bool:
        """Whether no activation that was quantized has an element."""
        met = [noise for name, noise in self.quantizers.items() if name not in self._weights]
        return bool(met) and not any(noise.count for noise in met)

    def _compare(self, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
        for name in {**expected, **got}:
            if name in expected and name in got and expected[name].shape == got[name].shape:
                self.outputs.setdefault(name, Noise()).add(expected[name], got[name])
            else:
                self.apart.add(name)

    @contextlib.contextmanager
    def _listening(self, model: nn.Module) -> Iterator[None]:
        def listen(name: str) -> Callable[..., None]:
            def hook(quantizer: TensorQuantizer, args: tuple[Any, ...], output: Tensor) -> None:
                if quantizer.is_enabled:
                    self.quantizers.setdefault(name, Noise()).add(args[0], output)

            return hook

        with contextlib.ExitStack() as hooks:
            for name, quantizer in named_quantizers(model):
                hooks.callback(quantizer.register_forward_hook(listen(name)).remove)
            yield

    def errors(self) -> tuple[tuple[TensorError, ...], tuple[TensorError, ...]]:
        """Return the errors of the outputs, and of the quantizers, the worst first."""
        outputs, quantizers = (
            [TensorError(name, noise.sqnr_db) for name, noise in of.items() if noise.is_finite]
            for of in (self.outputs, self.quantizers)
        )
        return tuple(outputs), tuple(sorted(quantizers, key=lambda error: error.sqnr_db))


def _tensors(output: Any) -> dict[str, Tensor]:
    """Return the float tensors of what a model returns, by their place."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {
        f"output{pytree.keystr(path)}": leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def never_called(model: nn.Module, run: Run) -> Iterator[Finding]:
    """A quantizer that no batch reaches quantizes nothing, and a learned range of it gets no gradient."""
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and name not in run.quantizers:
            yield Finding(
                name,
                f"expected a call, got none in {run.num_batches} batches",
                "Disable it, or give batches that reach it; code that reads the weight directly goes around it",
            )


def not_finite(model: nn.Module, run: Run) -> Iterator[Finding]:
    """The first quantizer that meets NaN or Inf shows where they come from: from before it."""
    unfit = [name for of in (run.quantizers, run.outputs) for name, noise in of.items() if not noise.is_finite]
    for name in unfit[:1]:
        text = f"expected finite values, got NaN or Inf, as in {len(unfit) - 1} tensors behind it"
        yield Finding(name, text, "Look at its range, at what is computed before it, and at the batches")


def unfit_grid(model: nn.Module, run: Run) -> Iterator[Finding]:
    """A range that is far too small or too large leaves 0 dB, as zeros would; two bits of a fitting one have 9 dB."""
    needs_range = {name for name, quantizer in named_quantizers(model) if quantizer.needs_range}
    for error in run.errors()[1]:
        if error.sqnr_db < _LEAST_DB and error.name in needs_range:
            text = f"expected twice as much signal as noise, got {error.sqnr_db:.1f} dB"
            yield Finding(error.name, text, "Its range is not that of these batches: calibrate on data like them")


def far_from_float(model: nn.Module, run: Run) -> Iterator[Finding]:
    """Training then starts from a model that has lost what it knew."""
    for error in run.errors()[0]:
        if error.sqnr_db < _LEAST_DB:
            text = f"expected twice as much signal as noise against the float model, got {error.sqnr_db:.1f} dB"
            yield Finding(error.name, text, "Use another calibration method, or more bits", is_hint=True)


def not_comparable(model: nn.Module, run: Run) -> Iterator[Finding]:
    """Nothing can be said of an output that is no tensor, or whose shape depends on its values."""
    for name in sorted(run.apart):
        text = "is not compared: its shape is another in the float model"
        yield Finding(name, text, "Check what the model returns before such a step", is_hint=True)
    if not (run.outputs or run.apart):
        yield Finding("", "returns no tensor that could be compared", "Pass forward, which returns one", is_hint=True)


CHECKS = (never_called, not_finite, unfit_grid, far_from_float, not_comparable)
