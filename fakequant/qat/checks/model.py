"""Checks of a model that need no data."""

from collections.abc import Iterator

from torch import nn

from fakequant.arithmetic import DEAD_AMAX
from fakequant.errors import FakeQuantError, InvalidValueError
from fakequant.nn.modules.batchnorm import is_moving
from fakequant.nn.modules.folded_layers import folded_pairs
from fakequant.nn.walk import named_quantizers, weights_of_quantizers
from fakequant.qat.checks.report import Finding
from fakequant.shortened import shortened


def uncalibrated(model: nn.Module) -> Iterator[Finding]:
    """Without a range, each call quantizes on another grid, and a learned range has nothing to train."""
    quantizers = [(name, q) for name, q in named_quantizers(model) if q.is_enabled and q.is_to_calibrate]
    is_following = any(quantizer.momentum is not None for _, quantizer in quantizers)
    for name, quantizer in quantizers:
        gets_range = quantizer.momentum is not None or (is_following and quantizer.is_weight)
        if not (quantizer.is_calibrated or (gets_range and not quantizer.descriptor.learn_amax)):
            yield Finding(name, "expected a range, got none", "Calibrate before training")


def unfit_range(model: nn.Module) -> Iterator[Finding]:
    """A range that is not finite makes everything behind it NaN; what has a range of 0 is lost."""
    for name, quantizer in named_quantizers(model):
        if not (quantizer.is_enabled and quantizer.is_whole):
            continue
        amax, amin = quantizer.ends
        if amax is None:
            continue
        span = amax if amin is None else amax - amin
        dead, size = int((span <= DEAD_AMAX).sum()), span.numel()
        if not bool(span.isfinite().all()):
            yield Finding(name, "expected a finite range, got NaN or Inf", "Calibrate again, on finite data")
        elif dead == size:
            yield Finding(name, "expected a range above 0, got 0", "Calibrate on data that reaches this layer")
        elif dead:
            text = f"{dead} of {size} ranges are 0"
            yield Finding(name, text, "Channels that were always 0 may stay so", is_hint=True)


def switched_off(model: nn.Module) -> Iterator[Finding]:
    """A quantizer that does nothing is one that nobody may have meant to leave out."""
    names = [name for name, q in named_quantizers(model) if not (q.is_enabled or q.stands_by)]
    if names:
        text = f"{len(names)} quantizers are switched off: {shortened(names)}"
        yield Finding("", text, "Call enable() and enable_quant() on those that shall quantize", is_hint=True)


def unfit_shape(model: nn.Module) -> Iterator[Finding]:
    """A range of another shape, such as one that a state dict brought, would be found by the first forward only."""
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    for quantizer, weight in weights_of_quantizers(model).items():
        if quantizer.is_calibrated and quantizer.is_enabled and quantizer.is_whole:
            try:
                quantizer.checked(weight.tensor.detach())
            except FakeQuantError as error:
                yield Finding(names[quantizer], str(error), "Calibrate again, or load the state of this model")


def nothing_quantizes(model: nn.Module) -> Iterator[Finding]:
    """Training would be that of the float model."""
    quantizers = [quantizer for _, quantizer in named_quantizers(model)]
    if quantizers and not any(quantizer.is_enabled for quantizer in quantizers):
        text = f"expected a quantizer that quantizes, got {len(quantizers)} that are off or wait for another target"
        yield Finding("", text, "Call enable(), or retarget()")


def collecting_statistics(model: nn.Module) -> Iterator[Finding]:
    """Histograms of every training step cost time and memory, and nobody reads them."""
    names = [name for name, q in named_quantizers(model) if q.is_collecting]
    if names:
        text = f"{len(names)} quantizers collect statistics in every call: {shortened(names)}"
        yield Finding("", text, "Call disable_calib() on them", is_hint=True)


def moving_norms(model: nn.Module) -> Iterator[Finding]:
    """Source: Krishnamoorthi 2018 (arXiv:1806.08342), section 3.2.2: batch statistics are noise for the quantizers."""
    names = [name for name, module in model.named_modules() if is_moving(module)]
    if names:
        text = f"{len(names)} batch norms move their statistics in training: {shortened(names)}"
        yield Finding("", text, "Freeze them, at the latest near the end: qat.freeze_batchnorm(model)", is_hint=True)


def torn_folds(model: nn.Module) -> Iterator[Finding]:
    """A folded layer without its norm normalizes in eval mode only, and the norm in its place everywhere."""
    try:
        folded_pairs(model)
    except InvalidValueError as error:
        yield Finding("", str(error), "Convert batch norms, such as to nn.SyncBatchNorm, before qat.fold_batchnorm")


def in_eval_mode(model: nn.Module) -> Iterator[Finding]:
    """Dropout, batch norms and ranges that follow the data do so in training mode only."""
    if not model.training:
        yield Finding("", "is in eval mode", "Call model.train() before training", is_hint=True)


CHECKS = (
    uncalibrated,
    unfit_range,
    unfit_shape,
    nothing_quantizes,
    switched_off,
    collecting_statistics,
    moving_norms,
    torn_folds,
    in_eval_mode,
)
