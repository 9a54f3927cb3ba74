"""What changes in the course of quantization-aware training, step by step."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from fakequant.arguments import check_count, check_module
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.walk import named_quantizers

Change: TypeAlias = Callable[[nn.Module], object]
"""Changes a model in place, such as ``freeze_ranges``, or a ``functools.partial`` of one with options."""


class Phases:
    """Calls functions on a model at given steps of its training.

    Call ``step()`` at the beginning of each training step, before the first forward pass that belongs to it:
    the functions of step 0 are called before anything is trained.

    A training that is resumed goes on as it was. That ranges follow the data, which batch norms are frozen and
    the numbers of bits are in no state dict of a model (a manifest has them): save ``state_dict()`` beside it, and
    ``load_state_dict`` sets them again. Which of the two is loaded first does not matter; but load that of the
    phases first if a function of your own changes weights.

    Every process of a distributed training has its own phases. They communicate only if a function does.

    Args:
        model: quantized; the plain module and not its wrapper (DDP, compiled).
        changes: {step: function, or several in order}. The step is a number from 0, or ``range(start, stop,
            every)`` for many. Functions of one step are called in the order of the mapping. One with options
            is a ``functools.partial``, such as ``partial(lower_bits, num_bits=4)``.

    Raises:
        InvalidTypeError: a key that is no int or range; a value that cannot be called; model is no nn.Module.
        InvalidValueError: a step below 0; a range that is empty or runs backwards.

    Ranges that follow for the first half, and nothing but weights that move in the second:

    >>> from fakequant import quantize
    >>> from fakequant.qat import FineTuning, follow_ranges, freeze_batchnorm, freeze_ranges, reestimate_weights
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> _ = quantize(model)
    >>> half = FineTuning.after_training(lr=0.1, steps=10_000).steps // 2
    >>> changes = {0: follow_ranges, range(0, half, 10): reestimate_weights, half: [freeze_ranges, freeze_batchnorm]}
    >>> phases = Phases(model, changes)
    >>> phases.step()
    >>> phases.state_dict()
    {'steps': 1}
    """

    def __init__(self, model: nn.Module, changes: Mapping[int | range, Change | Sequence[Change]]) -> None:
        check_module(model)
        if not isinstance(changes, Mapping):
            raise InvalidTypeError(f"changes: expected {{step: function}}, got {type(changes).__name__}")
        self._model = model
        self._changes = [
            (_as_steps(key), change) for key, functions in changes.items() for change in _as_list(key, functions)
        ]
        self._steps = 0

    def step(self) -> None:
        """Begin the next training step: call the functions of it. The step has not begun if one of them raises."""
        for steps, change in self._changes:
            if self._steps in steps:
                change(self._model)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps began."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict()``: call the functions of the steps passed, and put all ranges back after that.

        A function of many steps is called once, at the last of them. Ranges are put back also if one raises.

        Raises:
            InvalidTypeError: its number of steps is no int.
            InvalidValueError: a state before the present one; what was done since cannot be undone. Or none of this.
        """
        if not isinstance(state, Mapping) or "steps" not in state:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else repr(state)
            raise InvalidValueError(f"state: expected what Phases.state_dict returned, got {found}")
        steps = state["steps"]
        check_count("steps", steps, at_least=0)
        if steps < self._steps:
            raise InvalidValueError(f"steps: expected at least {self._steps}, which began already, got {steps}")
        ranges = [(quantizer, copy.deepcopy(quantizer.state_dict())) for _, quantizer in named_quantizers(self._model)]
        try:
            with torch.random.fork_rng(devices=[]):  # a loader of data draws from it
                for change in self._passed(steps):
                    change(self._model)
        finally:
            for quantizer, before in ranges:
                quantizer.load_state_dict(before)
        self._steps = steps

    def _passed(self, end: int) -> list[Change]:
        """Return what is called from the present step to an end, each once, in the order of the last calls."""
        passed = [(range(steps.start, min(steps.stop, end), steps.step), change) for steps, change in self._changes]
        last = [(steps[-1], change) for steps, change in passed if steps and steps[-1] >= self._steps]
        return [change for _, change in sorted(last, key=lambda item: item[0])]


def _as_steps(key: int | range) -> range:
    if isinstance(key, bool) or not isinstance(key, int | range):
        raise InvalidTypeError(f"changes: expected a step or a range of steps as key, got {key!r}")
    steps = key if isinstance(key, range) else range(key, key + 1)
    if not steps or steps.start < 0 or steps.step < 0:
        raise InvalidValueError(f"changes: expected steps from 0 on, in ascending order, got {key!r}")
    return steps


def _as_list(key: int | range, changes: Change | Sequence[Change]) -> list[Change]:
    found = [changes] if isinstance(changes, str) or not isinstance(changes, Sequence) else list(changes)
    for change in found:
        if isinstance(change, nn.Module):
            raise InvalidTypeError(
                f"changes[{key!r}]: expected functions of the model, got what one returned, a {type(change).__name__}: "
                "give the function itself, or a functools.partial of it"
            )
        if not callable(change):
            raise InvalidTypeError(f"changes[{key!r}]: expected functions of the model, got {change!r}")
    return found
