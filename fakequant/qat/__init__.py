"""Helpers for quantization-aware training."""

from fakequant.qat.batchnorm import freeze_batchnorm, unfreeze_batchnorm

__all__ = ["freeze_batchnorm", "unfreeze_batchnorm"]
