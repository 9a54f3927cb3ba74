"""Quantized bilinear layer: per-tensor inputs, weight per output (axis 0).

No runtime has an integer kernel for it, so ``quantize`` leaves it float unless a rule asks for it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.registry import register_on_request


@register_on_request(nn.Bilinear)
class QuantBilinear(QuantMixin, nn.Bilinear):
    """nn.Bilinear with quantized inputs [..., C1] and [..., C2] and weight [K, C1, C2]."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    input_names = ("input1", "input2")

    _input1_quantizer: TensorQuantizer
    _input2_quantizer: TensorQuantizer

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Return ``input1 @ weight[k] @ input2`` for each k, plus the bias."""
        x1, x2 = self._input1_quantizer(input1), self._input2_quantizer(input2)
        return F.bilinear(x1, x2, self._weight_quantizer(self.weight), self.bias)
