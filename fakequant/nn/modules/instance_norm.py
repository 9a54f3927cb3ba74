"""Quantized instance normalization: the input is quantized, the statistics and the affine part stay float."""

from torch import nn

from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.registry import register


@register(nn.InstanceNorm1d, by_default=False)
class QuantInstanceNorm1d(QuantizedInputForward, nn.InstanceNorm1d):
    """nn.InstanceNorm1d with a quantized input."""


@register(nn.InstanceNorm2d, by_default=False)
class QuantInstanceNorm2d(QuantizedInputForward, nn.InstanceNorm2d):
    """nn.InstanceNorm2d with a quantized input."""


@register(nn.InstanceNorm3d, by_default=False)
class QuantInstanceNorm3d(QuantizedInputForward, nn.InstanceNorm3d):
    """nn.InstanceNorm3d with a quantized input."""
