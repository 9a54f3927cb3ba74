"""Quantized convolutions: per-tensor input, per-channel weight along its output channels (axis 0)."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fakequant.descriptor import (
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
)
from fakequant.nn.modules.quant_module import QuantProduct
from fakequant.nn.registry import register


class _QuantConv(QuantProduct, _ConvNd):
    """What the three dimensions share: torch's own convolution of quantized arguments."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve as torch does, every padding mode included."""
        return self._conv_forward(self._input_quantizer(input), *self.weight_and_bias())


@register(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """nn.Conv1d with quantized input [N, C, L] and weight [K, C/groups, k]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL


@register(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """nn.Conv2d with quantized input [N, C, H, W] and weight [K, C/groups, kh, kw]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL


@register(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """nn.Conv3d with quantized input [N, C, D, H, W] and weight [K, C/groups, kd, kh, kw]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL
