"""The quantizers of a model as a table of text."""

import sys
from typing import TextIO

from torch import nn

from fakequant.nn.walk import named_quantizers


def quant_summary(model: nn.Module) -> str:
    """Return one line a quantizer: its name and its state, in order of registration.

    >>> from fakequant.nn import QuantLinear
    >>> print(quant_summary(QuantLinear(2, 2)))
    _input_quantizer   8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant
    _weight_quantizer  8bit narrow fake axis=0 amax=dynamic calibrator=MaxCalibrator quant
    2 quantizers, 2 enabled, 0 calibrated
    """
    quantizers = dict(named_quantizers(model))
    width = max(map(len, quantizers), default=0)
    enabled = [q for q in quantizers.values() if q.is_enabled]
    lines = [f"{name:<{width}}  {quantizer.extra_repr()}" for name, quantizer in quantizers.items()]
    calibrated = sum(q.is_calibrated for q in quantizers.values())
    return "\n".join([*lines, f"{len(quantizers)} quantizers, {len(enabled)} enabled, {calibrated} calibrated"])


def print_quant_summary(model: nn.Module, file: TextIO | None = None) -> None:
    """Write ``quant_summary`` to a file, by default standard output."""
    (file or sys.stdout).write(quant_summary(model) + "\n")
