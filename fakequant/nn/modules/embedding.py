"""Quantized embeddings: the table is quantized, per row (axis 0); its indices are integers already.

Nothing is multiplied by a table: in 8 bits it makes a file smaller, and TensorRT wants it
float, so ``quantize`` leaves it float unless a rule asks for it: ``Rule(type="Embedding*")``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from fakequant.errors import ExportError
from fakequant.nn.modules.quant_module import QuantInputMixin, QuantMixin
from fakequant.nn.registry import register_on_request
from fakequant.onnx_ops import is_exporting


class _QuantEmbedding(QuantMixin):
    """What the two classes share: torch's own look-up in the quantized table."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    input_names = ()

    max_norm: float | None
    norm_type: float
    sparse: bool

    def __init__(self, *args: Any, quant_desc_weight: QuantDescriptor | None = None, **kwargs: Any) -> None:
        super(QuantInputMixin, self).__init__(*args, **kwargs)  # which refuses quant_desc_input
        self.init_quantizer(None, quant_desc_weight)

    def _quantized(self, indices: Tensor, look_up: Callable[..., Tensor]) -> Tensor:
        """Return what look_up finds in the quantized table; it takes ``weight`` and ``sparse``."""
        if self.max_norm is not None:
            self._renormalize(indices, self.max_norm)
        if not (self.sparse and self._weight_quantizer.is_active and torch.is_grad_enabled()):
            return look_up(weight=self._weight_quantizer(self.weight), sparse=self.sparse)
        # The backward of a quantizer takes no sparse gradient: that of the weight goes around it, straight through.
        rows = look_up(weight=self.weight, sparse=True)
        return look_up(weight=self._weight_quantizer(self.weight.detach()), sparse=False) + (rows - rows.detach())

    def _renormalize(self, indices: Tensor, max_norm: float) -> None:
        """Scale the float rows that are looked up in place, as torch does; it would do so to their quantized copy."""
        if is_exporting() and self._weight_quantizer.is_enabled:
            raise ExportError(
                f"{self.float_class.__name__}: expected max_norm None, got {max_norm}: a file holds the rows as they "
                "are. Renormalize all of them once with torch.embedding_renorm_, then set max_norm to None"
            )
        torch.embedding_renorm_(self.weight.detach(), indices.contiguous(), max_norm, self.norm_type)


@register_on_request(nn.Embedding)
class QuantEmbedding(_QuantEmbedding, nn.Embedding):
    """nn.Embedding with quantized weight [N, E]."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the quantized rows of the indices."""
        of_indices = functools.partial(
            F.embedding, input, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
        return self._quantized(input, of_indices)


@register_on_request(nn.EmbeddingBag)
class QuantEmbeddingBag(_QuantEmbedding, nn.EmbeddingBag):
    """nn.EmbeddingBag with quantized weight [N, E]."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the sum, mean or maximum of the quantized rows of each bag."""
        of_bags = functools.partial(
            F.embedding_bag,
            input,
            offsets=offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        return self._quantized(input, of_bags)
