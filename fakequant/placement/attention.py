"""Attention written out: product, softmax, product."""

import dataclasses

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value

LONGEST_FUSED = 512
"""The longest sequence of TensorRT's fused INT8 attention (rule R42)."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """Two products with a softmax between.

    Args:
        scores: the first product, q with k.
        result: the second, probabilities with v.
        scaled_late: a factor is applied to the scores, not to q or k.
        masked: something that depends on the input is added to the scores.
    """

    scores: Call
    result: Call
    scaled_late: bool
    masked: bool

    def why_not_fused(self) -> str:
        """Return why TensorRT has no fused INT8 kernel, "" if it has."""
        if self.masked:
            return "the mask depends on the input; no fused kernel"
        if self.scaled_late:
            return "the scale is applied behind the first product; fused kernels want it before the quantizer of q"
        return why_too_long(self.scores.operand(0), self.scores.operand(1), key_axis=-1)


def why_too_long(query: Value | None, key: Value | None, key_axis: int) -> str:
    """Return why the sequence lengths or the head size rule a fused kernel out, "" if they do not."""
    assert query is not None
    assert key is not None
    longest = max(query.shape[-2], key.shape[key_axis])
    if longest > LONGEST_FUSED:
        return f"{longest} positions; the fused kernel ends at {LONGEST_FUSED}"
    if query.shape[-1] < 16:
        return f"head size {query.shape[-1]}, below 16"
    return ""


def find_attentions(graph: TensorGraph) -> list[Attention]:
    """Return every attention that is written as matmul, softmax, matmul."""
    return [found for call in graph.calls if call.role is Role.PRODUCT and (found := _ending_in(call)) is not None]


def _ending_in(result: Call) -> Attention | None:
    value = result.operand(0)
    scaled_late = masked = seen_softmax = False
    while value is not None and value.producer is not None:
        call = value.producer
        if call.role is Role.PRODUCT:
            return Attention(call, result, scaled_late, masked) if seen_softmax else None
        if call.role is Role.SOFTMAX:
            seen_softmax = True
        elif call.role is Role.MULTIPLY and seen_softmax:
            scaled_late = True
        elif (call.role is Role.ADD or call.kind in ("masked_fill", "where")) and seen_softmax:
            inputs = [operand for operand in call.operands if operand is not None and not operand.is_constant]
            masked = masked or len(inputs) > 1
        elif call.role not in (Role.IDENTITY, Role.MOVE):
            return None
        value = next((operand for operand in call.operands if operand is not None and operand.is_activation), None)
    return None
