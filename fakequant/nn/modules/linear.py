"""Quantized linear layers: per-tensor input, weight per output row (axis 0)."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.nn.modules.quant_module import QuantProduct
from fakequant.nn.registry import register


class _QuantLinear(QuantProduct, nn.Linear):
    """What the two classes share: torch's own product of quantized arguments."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return F.linear(self._input_quantizer(input), *self.weight_and_bias())


@register(nn.Linear)
class QuantLinear(_QuantLinear):
    """nn.Linear with quantized input [..., C] and weight [K, C]."""


@register(NonDynamicallyQuantizableLinear)
class QuantNonDynamicallyQuantizableLinear(_QuantLinear, NonDynamicallyQuantizableLinear):
    """The out_proj of nn.MultiheadAttention with quantized input [..., C] and weight [K, C]."""
