"""Quantized normalization: the input is quantized, the statistics and the affine part stay float.

No runtime normalizes in integers, and a batch norm is folded into the convolution before
it, which a quantizer between the two prevents, so ``quantize`` leaves all of them float
unless a rule asks for one.
"""

from torch import nn

from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.registry import register_on_request


@register_on_request(nn.LayerNorm)
class QuantLayerNorm(QuantizedInputForward, nn.LayerNorm):
    """nn.LayerNorm with a quantized input."""


@register_on_request(nn.RMSNorm)
class QuantRMSNorm(QuantizedInputForward, nn.RMSNorm):
    """nn.RMSNorm with a quantized input."""


@register_on_request(nn.GroupNorm)
class QuantGroupNorm(QuantizedInputForward, nn.GroupNorm):
    """nn.GroupNorm with a quantized input."""


@register_on_request(nn.LocalResponseNorm)
class QuantLocalResponseNorm(QuantizedInputForward, nn.LocalResponseNorm):
    """nn.LocalResponseNorm with a quantized input."""


@register_on_request(nn.BatchNorm1d)
class QuantBatchNorm1d(QuantizedInputForward, nn.BatchNorm1d):
    """nn.BatchNorm1d with a quantized input."""


@register_on_request(nn.BatchNorm2d)
class QuantBatchNorm2d(QuantizedInputForward, nn.BatchNorm2d):
    """nn.BatchNorm2d with a quantized input."""


@register_on_request(nn.BatchNorm3d)
class QuantBatchNorm3d(QuantizedInputForward, nn.BatchNorm3d):
    """nn.BatchNorm3d with a quantized input."""


@register_on_request(nn.SyncBatchNorm)
class QuantSyncBatchNorm(QuantizedInputForward, nn.SyncBatchNorm):
    """nn.SyncBatchNorm with a quantized input."""
