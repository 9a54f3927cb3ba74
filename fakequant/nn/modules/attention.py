"""torch's multi-head attention as the calls that it is made of.

nn.MultiheadAttention hands all of its weights to one function, in eval mode without
gradient to one fused kernel, and never calls out_proj: its products are out of sight of
quantizers, hooks and recorders. Here each is a call of its own. With every quantizer off,
torch's own forward runs, bit for bit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.errors import InvalidValueError
from fakequant.nn.functional import added_mask
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


def has_only_idle_quantizers(module: nn.Module) -> bool:
    """Whether a module holds quantizers, none of which quantizes or collects: torch's fused code may run."""
    quantizers = [child for child in module.modules() if isinstance(child, TensorQuantizer)]
    return bool(quantizers) and not any(quantizer.is_active for quantizer in quantizers)


class UnfusedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention that calls linear, attention and out_proj one by one, unless its quantizers are all idle.

    With ``need_weights=False`` the attention is one ``F.scaled_dot_product_attention``, otherwise matmul,
    softmax, matmul. An existing module becomes one by its ``__class__``; parameters and state_dict stay.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what torch's forward returns; arguments and shapes are torch's too.

        Raises:
            InvalidValueError: shapes that do not fit each other; is_causal, a hint about attn_mask, without it.
        """
        if has_only_idle_quantizers(self):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise InvalidValueError("attn_mask: expected the mask that is_causal=True tells about, got None")
        self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        # torch too trusts the hint only where no other mask and no weights are asked for.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._added_mask(attn_mask, key_padding_mask, query.dtype)
        q, k, v = (self._to_heads(projected) for projected in self._project(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        if need_weights:
            attended, weights = self._attend(q, k, v, mask)
        else:
            attended, weights = self._attend_at_once(q, k, v, mask, is_causal), None
        output = self.out_proj(self._from_heads(attended, is_batched))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        return output, weights

    def _check_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Refuse what would broadcast in silence; torch.jit.trace has no shapes to compare."""
        if torch.jit.is_tracing():
            return
        queries, keys = ([*x.shape[:-1]] for x in (query, key))
        if query.dim() == 3 and not self.batch_first:
            queries, keys = queries[::-1], keys[::-1]
        (*batch, target), (*key_batch, source) = queries, keys
        if key_batch != batch or key.shape[:-1] != value.shape[:-1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise InvalidValueError(
                f"query, key, value: expected one batch size, and one length of key and value, got shapes {shapes}"
            )
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (*batch, source))
        if attn_mask is not None:
            heads = () if attn_mask.dim() == 2 else (math.prod(batch) * self.num_heads,)
            _check_mask("attn_mask", attn_mask, (*heads, target, source))

    def _added_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Return both masks as one that is added to the scores [N, heads, L, S]; for a bool mask True is -inf."""
        mask = None
        if attn_mask is not None:
            mask = added_mask(attn_mask, dtype)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = added_mask(key_padding_mask, dtype)[..., None, None, :]
            mask = padding if mask is None else mask + padding
        added = (self.bias_k is not None) + self.add_zero_attn
        if mask is None or not added:
            return mask
        # Not F.pad: the TorchScript exporter warns about it.
        return torch.cat([mask, *[torch.zeros_like(mask[..., :1])] * added], dim=-1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key and key is value:
            packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return torch.split(packed, self.embed_dim, dim=-1)
        return self._project_each((query, key, value), self._projection_weights())

    def _projection_weights(self) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim:
            return torch.split(self.in_proj_weight, self.embed_dim)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project_each(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        biases = (None, None, None) if self.in_proj_bias is None else torch.split(self.in_proj_bias, self.embed_dim)
        return tuple(F.linear(*arguments) for arguments in zip(inputs, weights, biases, strict=True))

    def _to_heads(self, x: Tensor) -> Tensor:
        """Return [L, E], [L, N, E] or, with batch_first, [N, L, E] as [N, heads, L, E / heads]."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        # Not unflatten, nor chunk or flatten elsewhere: the TorchScript exporter makes a dozen nodes of each.
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _from_heads(self, x: Tensor, is_batched: bool) -> Tensor:
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.embed_dim)
        if not is_batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return keys or values with the learned and the zero element at the end, where the module has them."""
        parts, shape = [x], (x.shape[0], self.num_heads, 1, self.head_dim)
        if bias is not None:
            parts.append(bias.reshape(1, self.num_heads, 1, self.head_dim).expand(shape))
        if self.add_zero_attn:
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, dim=2) if len(parts) > 1 else x

    def _attend_at_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # torch would take the same scale from the shape; given, it is a constant in every exported file.
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.head_dim**-0.5)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        # Rows in memory, as in fakequant.nn.functional.attention: matmul would copy what was quantized.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        # As in F.multi_head_attention_forward: the scale on the query, the dropout in the returned weights.
        q, k = self._operand("q", q * self.head_dim**-0.5), self._operand("k", k.transpose(-2, -1))
        scores = torch.matmul(q, k)
        # Under autocast the mask has the dtype of the input, and the product a smaller one.
        weights = F.softmax(scores if mask is None else scores + mask.to(scores.dtype), dim=-1)
        weights = self._operand("softmax", weights)
        if self.training and self.dropout > 0.0:
            weights = F.dropout(weights, self.dropout)
        return torch.matmul(weights, self._operand("v", v)), weights

    def _operand(self, name: str, x: Tensor) -> Tensor:
        """Return an operand of one of the two products; a subclass may quantize it: "q", "k", "softmax", "v"."""
        return x


def _check_mask(name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise InvalidValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")
