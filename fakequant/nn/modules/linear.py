"""Quantized linear layer: per-tensor input, weight per output row (axis 0)."""

import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.registry import register


@register(nn.Linear)
class QuantLinear(QuantMixin, nn.Linear):
    """nn.Linear with quantized input [..., C] and weight [K, C]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return F.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)
