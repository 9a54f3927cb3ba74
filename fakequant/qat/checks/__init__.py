"""qat.check: is this model, with this optimizer, ready to be trained?"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fakequant.arguments import check_number, check_optimizer
from fakequant.batches import feed
from fakequant.errors import InvalidValueError
from fakequant.nn.walk import check_is_quantized
from fakequant.qat.checks import model as of_model
from fakequant.qat.checks import optimizer as of_optimizer
from fakequant.qat.checks import run as of_run
from fakequant.qat.checks.report import CheckReport, Finding, TensorError

__all__ = ["CheckReport", "Finding", "TensorError", "check"]


def check(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> CheckReport:
    """Check a quantized model before it is trained. Its modes and ranges stay as they are.

    Looked at are ranges, switches and batch norms; with batches, whether every quantizer is called, and the error of
    each and of the outputs against the float model; with an optimizer, whether it trains this model's parameters.

    Args:
        model: quantized and calibrated.
        batches: some batches, as for ``calibrate``; the model runs twice on each, in eval mode.
        optimizer: that will train it.
        lr: the learning rate of the float training, for advice.
        forward: runs the model on one batch of another kind, as for ``calibrate``.

    Returns:
        Problems and hints; ``print`` it, or ``check(...).raise_for_problems()``.

    Raises:
        InvalidTypeError: a batch of another kind without ``forward``; another argument of another kind.
        InvalidValueError: a model without quantizers; no batch among batches, or only empty ones; an lr that is not
            positive and finite.

    >>> from fakequant.nn import QuantLinear
    >>> print(check(QuantLinear(2, 2)))
    problems:
      _input_quantizer: expected a range, got none. Calibrate before training.
      _weight_quantizer: expected a range, got none. Calibrate before training.
    """
    check_is_quantized(model)
    if optimizer is not None:
        check_optimizer(optimizer)
    if lr is not None:
        check_number("lr", lr, above=0)
    findings = [finding for found in of_model.CHECKS for finding in found(model)]
    if optimizer is not None:
        findings += [finding for found in of_optimizer.CHECKS for finding in found(model, optimizer)]
    if lr is not None:
        findings += of_optimizer.learning_rate(model, optimizer, lr)
    if batches is None:
        return CheckReport(tuple(findings))
    run = of_run.Run(model, batches, forward or feed)
    if not run.num_batches:
        raise InvalidValueError("batches: expected at least one, got none")
    if run.is_empty:
        raise InvalidValueError(f"batches: expected tensors with elements, got none in {run.num_batches}")
    findings += [finding for found in of_run.CHECKS for finding in found(model, run)]
    return CheckReport(tuple(findings), run.num_batches, *run.errors())
