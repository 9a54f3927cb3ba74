"""Quantized multi-head attention: quantizers of its own on every product.

With an example, quantizers go to the calls inside of the unfused module instead, where the
target wants them, and a module that has its own loses them.
"""

from typing import Any

from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from fakequant.nn.functional import attention
from fakequant.nn.modules.attention import UnfusedMultiheadAttention
from fakequant.nn.modules.linear import QuantNonDynamicallyQuantizableLinear
from fakequant.nn.modules.quant_module import QuantMixin, quantizer_name
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.registry import register

_OPERANDS = ("q", "k", "v", "softmax")


@register(nn.MultiheadAttention, seen_through=True)
class QuantMultiheadAttention(QuantMixin, UnfusedMultiheadAttention):
    """nn.MultiheadAttention with quantized inputs, projection weights [E, C] and operands of both products.

    Input and weight of ``out_proj`` are quantized by that module's own quantizers. The three projections have
    their own quantizers also where query, key and value are one tensor, whose ranges are then equal.
    """

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    input_names = ("query", "key", "value", *_OPERANDS)

    def __init__(
        self,
        *args: Any,
        quant_desc_input: QuantDescriptor | None = None,
        quant_desc_weight: QuantDescriptor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, quant_desc_input=quant_desc_input, quant_desc_weight=quant_desc_weight, **kwargs)
        self.out_proj.__class__ = QuantNonDynamicallyQuantizableLinear
        assert isinstance(self.out_proj, QuantNonDynamicallyQuantizableLinear)
        self.out_proj.init_quantizer(quant_desc_input, quant_desc_weight)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """One a projection; each is a part of in_proj_weight unless the module has them apart."""
        return ("query_weight", "key_weight", "value_weight")

    @property
    def query_weight(self) -> Tensor:
        """The weight that query is multiplied by."""
        return self._projection_weights()[0]

    @property
    def key_weight(self) -> Tensor:
        """The weight that key is multiplied by."""
        return self._projection_weights()[1]

    @property
    def value_weight(self) -> Tensor:
        """The weight that value is multiplied by."""
        return self._projection_weights()[2]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        inputs = (self._operand("query", query), self._operand("key", key), self._operand("value", value))
        pairs = zip(self.weight_quantizers(), self._projection_weights(), strict=True)
        return self._project_each(inputs, tuple(quantizer(weight) for (_, quantizer), weight in pairs))

    def _operand(self, name: str, x: Tensor) -> Tensor:
        return self._quantizer(name)(x)  # type: ignore[no-any-return]

    def _quantizer(self, name: str) -> TensorQuantizer:
        return self._modules[quantizer_name(name)]  # type: ignore[return-value]

    def _attend_at_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return attention(
            q,
            k,
            v,
            mask,
            self.dropout if self.training else 0.0,
            is_causal,
            query_quantizer=self._quantizer("q"),
            key_quantizer=self._quantizer("k"),
            value_quantizer=self._quantizer("v"),
            softmax_quantizer=self._quantizer("softmax"),
        )
