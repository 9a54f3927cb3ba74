"""Functions of fakequant.nn that are no quantizers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fakequant.errors import InvalidTypeError, InvalidValueError


def clip(input: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """Return ``max(min(input, clip_value_max), clip_value_min)``, with gradients for the bounds.

    The bounds broadcast against input. The gradient reaches input strictly inside the
    bounds; at and beyond a bound it goes to that bound, summed to its shape (PACT, arXiv:1805.06085).

    >>> clip(torch.tensor([-2.0, 0.5, 2.0]), torch.tensor(-1.0), torch.tensor(1.0))
    tensor([-1.0000,  0.5000,  1.0000])
    """
    capped = torch.where(input >= clip_value_max, clip_value_max, input)
    return torch.where(capped <= clip_value_min, clip_value_min, capped)


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to attention scores: -inf where a bool mask is True; a float mask is added as it is.

    Raises:
        InvalidTypeError: a mask that is neither bool nor floating point.

    >>> added_mask(torch.tensor([True, False]), torch.float32)
    tensor([-inf, 0.])
    """
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise InvalidTypeError(f"mask: expected bool or floating point, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def attention(  # noqa: PLR0913 - the arguments of F.scaled_dot_product_attention, and one for each product's operand
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_quantizer: Callable[[Tensor], Tensor],
    key_quantizer: Callable[[Tensor], Tensor],
    value_quantizer: Callable[[Tensor], Tensor],
    softmax_quantizer: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return F.scaled_dot_product_attention with its two matrix products on quantized operands.

    ``matmul(softmax_quantizer(softmax(matmul(query_quantizer(query * scale), key_quantizer(key.T)) + mask)),
    value_quantizer(value))``. A row without any allowed key is NaN, as in the formula of torch's documentation.

    Args:
        query: [N, ..., heads, L, E].
        key: [N, ..., heads, S, E].
        value: [N, ..., heads, S, Ev].
        attn_mask: broadcasts to [N, ..., heads, L, S]. Bool: True takes part; float: is added.
        dropout_p: of the quantized probabilities.
        is_causal: query i sees the keys 0..i.
        scale: None for ``1 / sqrt(E)``.
        enable_gqa: key and value have fewer heads, each for a group of queries. They are quantized repeated.
        query_quantizer: of the scaled query.
        key_quantizer: of the key.
        value_quantizer: of the value.
        softmax_quantizer: of the probabilities.

    Raises:
        InvalidValueError: both a mask and is_causal.

    >>> key, same = torch.eye(2), lambda x: x
    >>> attention(key, key, key, is_causal=True, query_quantizer=same, key_quantizer=same,
    ...     value_quantizer=same, softmax_quantizer=torch.round)
    tensor([[1., 0.],
            [0., 1.]])
    """
    if is_causal and attn_mask is not None:
        raise InvalidValueError("attn_mask: expected None with is_causal=True, got a mask")
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    # matmul copies heads that are no rows in memory; copied here, what it keeps is what the quantizers made.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    # The scale goes in front of the quantizer: TensorRT's fused attention expects it there.
    scaled = query * (query.size(-1) ** -0.5 if scale is None else scale)
    scores = torch.matmul(query_quantizer(scaled), key_quantizer(key.transpose(-2, -1)))
    if is_causal:
        rows, columns = (torch.arange(x.size(-2), device=query.device) for x in (query, key))
        attn_mask = rows[:, None] >= columns
    if attn_mask is not None:
        excluded = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask
        scores = scores + added_mask(excluded, query.dtype)
    # Dropout comes behind the quantizer: it scales what it keeps beyond the range of probabilities.
    probabilities = softmax_quantizer(torch.softmax(scores, dim=-1))
    if dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.matmul(probabilities, value_quantizer(value))
