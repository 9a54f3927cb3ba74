"""Quantized transposed convolutions: per-tensor input, weight [C, K/groups, ...] per channel along axis 1.

With groups > 1 the K output channels share K/groups ranges: output channel k has range
``k % (K/groups)``. ONNX can express no finer range for a grouped transposed convolution.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fakequant.descriptor import (
    QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
)
from fakequant.errors import InvalidValueError
from fakequant.nn.modules.quant_module import QuantProduct
from fakequant.nn.registry import register


class _QuantConvTranspose(QuantProduct, _ConvTransposeNd):
    """What the three dimensions share: torch's own forward with quantized arguments."""

    _function: Callable[..., Tensor]
    _spatial_dims: int

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve as torch does; output_size resolves the ambiguity of strides > 1."""
        if self.padding_mode != "zeros":
            raise InvalidValueError(f"{type(self).__name__}: expected padding_mode 'zeros', got {self.padding_mode!r}")
        output_padding = self._output_padding(
            input,
            None if output_size is None else list(output_size),
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            self._spatial_dims,
            self.dilation,  # type: ignore[arg-type]
        )
        return type(self)._function(
            self._input_quantizer(input),
            *self.weight_and_bias(),
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


@register(nn.ConvTranspose1d)
class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with quantized input [N, C, L] and weight [C, K/groups, k]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL
    _function = F.conv_transpose1d
    _spatial_dims = 1


@register(nn.ConvTranspose2d)
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with quantized input [N, C, H, W] and weight [C, K/groups, kh, kw]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL
    _function = F.conv_transpose2d
    _spatial_dims = 2


@register(nn.ConvTranspose3d)
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with quantized input [N, C, D, H, W] and weight [C, K/groups, kd, kh, kw]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL
    _function = F.conv_transpose3d
    _spatial_dims = 3
