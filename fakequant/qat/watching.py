"""Watching a training: what is not finite, and ranges that run away, are errors with the name of the quantizer.

Nothing is read back from the device while the model runs. Hooks keep the largest magnitude that each quantizer meets,
and ``Watch.step`` looks at all of these and at all ranges at once, with one synchronization.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fakequant.arguments import check_number, check_optimizer
from fakequant.arithmetic import DEAD_AMAX
from fakequant.errors import TrainingError
from fakequant.nn import TensorQuantizer
from fakequant.nn.sharding import share
from fakequant.nn.walk import check_is_quantized, named_quantizers
from fakequant.shortened import shortened


class _Log:
    """What each quantizer met since the last look, in order of execution. That of a copied or pickled model is off."""

    def __init__(self, largest: dict[str, Tensor | None] | None = None) -> None:
        self.largest = largest

    def __reduce__(self) -> tuple[Any, ...]:
        return _Log, ()


def _meet(log: _Log, name: str, quantizer: TensorQuantizer, args: tuple[Any, ...]) -> None:
    if log.largest is None or not torch.is_grad_enabled() or torch.compiler.is_exporting() or not args[0].numel():
        return
    x = args[0].detach()
    # Not the sum, which masks of -3e38 overflow; not aminmax, five times slower where memory is channels_last.
    largest = torch.maximum(x.amax(), -x.amin())
    known = log.largest.get(name)
    log.largest[name] = largest if known is None else torch.maximum(known, largest)


class Watch:
    """What ``watch`` returns; ``remove()``, or the end of its with block, ends it.

    Attributes:
        steps: how many there were.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, factor: float) -> None:
        self.steps = 0
        self._model = model
        self._factor = factor
        self._quantizers = dict(named_quantizers(model))
        self._start: dict[tuple[str, str], Tensor] = {}
        self._remember(self._ranges())
        self._log = _Log({})
        self._handles: list[Any] = [
            quantizer.register_forward_pre_hook(functools.partial(_meet, self._log, name))
            for name, quantizer in self._quantizers.items()
            if not (quantizer.is_weight or quantizer.stands_by)
        ]
        self._meets = bool(self._handles)
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.step()))

    def step(self) -> None:
        """Look at what the quantizers met since the last step, and at every range. Call it behind the optimizer's step.

        Raises:
            TrainingError: what a quantizer met, or its range, is not finite; a range ran away; no quantizer ran.
                Names the step, each quantizer and the values.
        """
        self.steps += 1
        met = {name: largest for name, largest in (self._log.largest or {}).items() if largest is not None}
        self._log.largest = dict.fromkeys(self._log.largest or {})
        if self._meets and not met:
            raise TrainingError(
                f"step {self.steps}: expected the watched model to have run with gradient since the last step, got no "
                "call. Watch the model that is trained, not a copy, and before it is compiled by its first call"
            )
        ranges = self._ranges()
        self._remember(ranges)
        self._look(met, ranges)

    def remove(self) -> None:
        """Stop watching."""
        self._log.largest = None
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _ranges(self) -> dict[tuple[str, str], Tensor]:
        """Return every known end of a range by the names of its quantizer and of the end."""
        return {
            (name, key): share(getattr(quantizer, key).detach())
            for name, quantizer in self._quantizers.items()
            if quantizer.is_calibrated
            for key in quantizer.range_keys
        }

    def _remember(self, ranges: dict[tuple[str, str], Tensor]) -> None:
        """Let ranges that are new, or of another shape than before, start here."""
        for end, value in ranges.items():
            if end not in self._start or self._start[end].shape != value.shape:
                self._start[end] = value.clone()

    def _look(self, met: dict[str, Tensor], ranges: dict[tuple[str, str], Tensor]) -> None:
        largest, now, start = _flat(met.values()), _flat(ranges.values()), _flat(self._start[end] for end in ranges)
        if bool((~largest.isfinite()).any() | self._is_off(now, start).any()):
            problems = [*_unfit(met), *self._unfit_ranges(ranges), *self._unfit_parameters()]
            raise TrainingError("\n  ".join([f"step {self.steps}:", *problems]))

    def _is_off(self, now: Tensor, start: Tensor) -> Tensor:
        """Return where a range is not finite, or too far from its start; one that was zero may become any."""
        now, start = now.abs(), start.abs()
        is_near = (now <= self._factor * start) & (self._factor * now >= start)
        return ~now.isfinite() | ~(is_near | (start <= DEAD_AMAX))

    def _unfit_ranges(self, ranges: dict[tuple[str, str], Tensor]) -> Iterator[str]:
        for (name, key), now in ranges.items():
            is_off = self._is_off(now, self._start[name, key])
            if not bool(is_off.any()):
                continue
            end, first, start = key[1:], now[is_off][0].item(), self._start[name, key][is_off][0].item()
            grad = getattr(self._quantizers[name], key).grad
            why = "" if grad is None or bool(share(grad).isfinite().all()) else "; its gradient is not finite"
            yield (
                f"{name}: expected {end} within a factor {self._factor:g} of {start:.6g}, where it started, got "
                f"{first:.6g}{why}. Lower the learning rate (of learned ranges: range_lr of qat.parameter_groups)"
            )

    def _unfit_parameters(self) -> Iterator[str]:
        names = [name for name, value in self._model.named_parameters() if not bool(share(value).isfinite().all())]
        if names:
            yield f"parameters that are not finite: {shortened(names)}"


def _unfit(met: dict[str, Tensor]) -> Iterator[str]:
    """Name the first quantizer, in order of execution, that met NaN or Inf: what comes before it is at fault."""
    unfit = [(name, largest.item()) for name, largest in met.items() if not bool(largest.isfinite())]
    for name, value in unfit[:1]:
        yield (
            f"{name}: expected finite inputs, got {value:g} (so did {len(unfit) - 1} quantizers behind it). Lower the "
            "learning rate, clip gradients, or use bfloat16 in place of float16"
        )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return all elements in one tensor."""
    parts = [tensor.reshape(-1) for tensor in tensors]
    return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.empty(0)


def watch(model: nn.Module, optimizer: Optimizer | None = None, *, factor: float = 2.0**10) -> Watch:
    """Watch a training, and stop it with an error that names the quantizer that fails first.

    ::

        with qat.watch(model, optimizer):
            train(model, optimizer)

    Looked at are the inputs of activation quantizers in forward passes with gradient, and every range, once after
    each step of the optimizer: steps that a GradScaler leaves out, and gradients that overflow in them, are no error.
    A gradient that is not finite shows in its range after the same step. Evaluation is not watched.

    Watch a model before torch.compile compiles it in its first call: torch does not see hooks that come later.
    A copy of the model, such as an average of it, is not watched; checkpoints and pickles are as without. In a
    distributed training each process looks at what it has: under ``fully_shard`` at its share of the ranges.

    Args:
        model: that is trained.
        optimizer: look after each of its steps; None for calls of ``Watch.step``.
        factor: how far a range may come from its start, up or down. A grid of 8 bits has fewer than 2**8 values on
            each side of 0, so what a range held before it grew by 2**10 is all rounded to 0.

    Returns:
        A handle, also for a with block.

    Raises:
        InvalidTypeError: model is no nn.Module, optimizer none of torch, factor no number.
        InvalidValueError: a model without quantizers; a factor that is not above 1 and finite.

    >>> from fakequant.nn import QuantLinear
    >>> layer = QuantLinear(2, 2)
    >>> layer.input_quantizer.amax = 1.0
    >>> with watch(layer) as watching:
    ...     _ = layer(torch.ones(1, 2))
    ...     watching.step()
    """
    check_is_quantized(model)
    check_number("factor", factor, above=1)
    if optimizer is not None:
        check_optimizer(optimizer)
    return Watch(model, optimizer, factor)
