"""Quantized pooling: the input is quantized, the rest is torch's own.

A max pool commutes with quantization, and an average pool gains only where its output is
quantized too, so ``quantize`` leaves both float unless a rule asks for them.
"""

from torch import nn

from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.registry import register


@register(nn.MaxPool1d)
class QuantMaxPool1d(QuantizedInputForward, nn.MaxPool1d):
    """nn.MaxPool1d with a quantized input."""


@register(nn.MaxPool2d)
class QuantMaxPool2d(QuantizedInputForward, nn.MaxPool2d):
    """nn.MaxPool2d with a quantized input."""


@register(nn.MaxPool3d)
class QuantMaxPool3d(QuantizedInputForward, nn.MaxPool3d):
    """nn.MaxPool3d with a quantized input."""


@register(nn.AvgPool1d)
class QuantAvgPool1d(QuantizedInputForward, nn.AvgPool1d):
    """nn.AvgPool1d with a quantized input."""


@register(nn.AvgPool2d)
class QuantAvgPool2d(QuantizedInputForward, nn.AvgPool2d):
    """nn.AvgPool2d with a quantized input."""


@register(nn.AvgPool3d)
class QuantAvgPool3d(QuantizedInputForward, nn.AvgPool3d):
    """nn.AvgPool3d with a quantized input."""


@register(nn.AdaptiveAvgPool1d)
class QuantAdaptiveAvgPool1d(QuantizedInputForward, nn.AdaptiveAvgPool1d):
    """nn.AdaptiveAvgPool1d with a quantized input."""


@register(nn.AdaptiveAvgPool2d)
class QuantAdaptiveAvgPool2d(QuantizedInputForward, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d with a quantized input."""


@register(nn.AdaptiveAvgPool3d)
class QuantAdaptiveAvgPool3d(QuantizedInputForward, nn.AdaptiveAvgPool3d):
    """nn.AdaptiveAvgPool3d with a quantized input."""
