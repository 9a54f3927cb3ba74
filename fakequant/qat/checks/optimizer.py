"""Checks of an optimizer: does it train this model, and how fast?"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from fakequant.nn.walk import named_quantizers
from fakequant.qat.checks.report import Finding
from fakequant.qat.fine_tuning import FineTuning
from fakequant.shortened import shortened

_TOO_FAST = 10
"""So many times the learning rate of ``FineTuning`` is worth a word."""


def untrained(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """Nobody trains a parameter that came after the optimizer was made, such as a learned range."""
    held = {id(parameter) for parameter in _parameters(optimizer)}
    ranges = _ranges(model)
    absent = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    advice = "Make the optimizer after quantize(), from qat.parameter_groups(model, lr)"
    for name, parameter in absent.items():
        if id(parameter) in ranges:
            yield Finding(name, "expected the optimizer to have this learned range, got none", advice)
    if others := [name for name, parameter in absent.items() if id(parameter) not in ranges]:
        text = f"the optimizer has not {len(others)} parameters that require a gradient: {shortened(others)}"
        yield Finding("", text, advice, is_hint=True)


def foreign(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """An optimizer that was made for a copy, or before parameters were replaced, trains what nobody runs."""
    own = {id(parameter) for parameter in model.parameters()}
    shapes = [str(tuple(p.shape)) for p in _parameters(optimizer) if id(p) not in own]
    if shapes:
        text = f"{len(shapes)} parameters of the optimizer are not the model's, of shapes {shortened(shapes)}"
        yield Finding("", text, "Make the optimizer of the model that is trained, after it got its parameters")


def stale_state(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """A state in the shape of another range: Adagrad's, made before calibration, or of a range calibrated anew."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                text = f"expected {key} of shape {tuple(parameter.shape)} in the optimizer, got {tuple(value.shape)}"
                yield Finding(name, text, "Make the optimizer after calibrate()")


def decayed_ranges(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """Weight decay pulls a range towards zero."""
    ranges = _ranges(model)
    for group in optimizer.param_groups:
        names = [ranges[id(p)] for p in group["params"] if id(p) in ranges] if group.get("weight_decay") else []
        if names:
            text = f"{len(names)} learned ranges have weight decay {group['weight_decay']:g}: {shortened(names)}"
            yield Finding("", text, "Give them none: qat.parameter_groups(model, lr, weight_decay=...)", is_hint=True)


def learning_rate(model: nn.Module, optimizer: Optimizer | None, lr: float) -> Iterator[Finding]:
    """Source: see ``FineTuning``.

    Args:
        model: to be trained.
        optimizer: None if there is none yet.
        lr: of the float training.
    """
    advised = FineTuning.after_training(lr, steps=1).lr
    ranges = _ranges(model)
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [float(group["lr"]) for group in groups if any(id(p) not in ranges for p in group["params"])]
    if optimizer is None or max(rates, default=0.0) > _TOO_FAST * advised:
        text = f"the float training had the learning rate {lr:g}" + (f", this one {max(rates):g}" if rates else "")
        yield Finding("", text, f"Begin at {advised:g} and come down: qat.FineTuning.after_training", is_hint=True)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _ranges(model: nn.Module) -> dict[int, str]:
    """Return the full name of the quantizer of each learned range, by the id of its parameter."""
    return {id(parameter): name for name, quantizer in named_quantizers(model) for parameter in quantizer.parameters()}


CHECKS = (untrained, foreign, stale_state, decayed_ranges)
