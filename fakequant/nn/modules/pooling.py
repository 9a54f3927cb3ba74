"""Quantized pooling: the input is quantized, the rest is torch's own.

A max pool commutes with quantization, and an average pool gains only where its output is
quantized too, so ``quantize`` leaves them and all others float unless a rule asks for one.
"""

from torch import nn

from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.registry import register, register_on_request


@register(nn.MaxPool1d, by_default=False)
class QuantMaxPool1d(QuantizedInputForward, nn.MaxPool1d):
    """nn.MaxPool1d with a quantized input."""


@register(nn.MaxPool2d, by_default=False)
class QuantMaxPool2d(QuantizedInputForward, nn.MaxPool2d):
    """nn.MaxPool2d with a quantized input."""


@register(nn.MaxPool3d, by_default=False)
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


@register_on_request(nn.AdaptiveMaxPool1d)
class QuantAdaptiveMaxPool1d(QuantizedInputForward, nn.AdaptiveMaxPool1d):
    """nn.AdaptiveMaxPool1d with a quantized input."""


@register_on_request(nn.AdaptiveMaxPool2d)
class QuantAdaptiveMaxPool2d(QuantizedInputForward, nn.AdaptiveMaxPool2d):
    """nn.AdaptiveMaxPool2d with a quantized input."""


@register_on_request(nn.AdaptiveMaxPool3d)
class QuantAdaptiveMaxPool3d(QuantizedInputForward, nn.AdaptiveMaxPool3d):
    """nn.AdaptiveMaxPool3d with a quantized input."""


@register_on_request(nn.LPPool1d)
class QuantLPPool1d(QuantizedInputForward, nn.LPPool1d):
    """nn.LPPool1d with a quantized input."""


@register_on_request(nn.LPPool2d)
class QuantLPPool2d(QuantizedInputForward, nn.LPPool2d):
    """nn.LPPool2d with a quantized input."""


@register_on_request(nn.LPPool3d)
class QuantLPPool3d(QuantizedInputForward, nn.LPPool3d):
    """nn.LPPool3d with a quantized input."""


@register_on_request(nn.FractionalMaxPool2d)
class QuantFractionalMaxPool2d(QuantizedInputForward, nn.FractionalMaxPool2d):
    """nn.FractionalMaxPool2d with a quantized input."""


@register_on_request(nn.FractionalMaxPool3d)
class QuantFractionalMaxPool3d(QuantizedInputForward, nn.FractionalMaxPool3d):
    """nn.FractionalMaxPool3d with a quantized input."""
