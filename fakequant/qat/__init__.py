"""Helpers for quantization-aware training."""

from fakequant.qat.batchnorm import freeze_batchnorm, unfreeze_batchnorm
from fakequant.qat.gradients import QuantizedGradients, quantize_gradients
from fakequant.qat.lsq_plus import start_lsq_plus
from fakequant.qat.moving_average import follow_ranges, freeze_ranges

__all__ = [
    "QuantizedGradients",
    "follow_ranges",
    "freeze_batchnorm",
    "freeze_ranges",
    "quantize_gradients",
    "start_lsq_plus",
    "unfreeze_batchnorm",
]
