"""Attention: its two products are quantized whole, where there is a fused kernel, or not at all (rule R42)."""

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.paths import is_quantized, moves
from fakequant.export.checks.view import PAIR, View
from fakequant.placement.attention import LONGEST_FUSED


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Product of q and k, softmax, product with v.

    Args:
        scores: the first product.
        result: the second.
        between: ops from the first to the softmax.
    """

    scores: ir.Node
    result: ir.Node
    between: tuple[ir.Node, ...]


@check("R42", Severity.WARNING, "Leave both products float")
def quantized_but_not_fused(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer find_nodes_from_mha_to_exclude; TensorRT documentation on fused attention."""
    for found in _attentions(view):
        operands = [*found.scores.inputs[:2], *found.result.inputs[:2]]
        quantized = [is_quantized(value) for value in operands]
        if not any(quantized):
            continue
        reason = _why_not_fused(view, found)
        if not all(quantized) and not reason:
            names = [n for n, there in zip(("q", "k", "the probabilities", "v"), quantized, strict=True) if not there]
            reason = f"{' and '.join(names)} in float"
        if reason:
            yield found.scores, f"expected attention with a fused INT8 kernel or in float, got Q/DQ and {reason}"


def _why_not_fused(view: View, found: _Attention) -> str:
    for node in found.between:
        dynamic = [value for value in node.inputs if value is not None and not view.is_constant(value)]
        if node.op_type in {"Add", "Where"} and len(dynamic) > 1:
            return "a mask that depends on the input"
        if node.op_type in {"Mul", "Div"}:
            return "a factor behind the first product; it belongs in front of the Q of q or k"
    shape = found.scores.outputs[0].shape
    longest = max((size for size in shape[-2:] if isinstance(size, int)), default=0) if shape is not None else 0
    return f"{longest} positions, where the kernel ends at {LONGEST_FUSED}" if longest > LONGEST_FUSED else ""


def _attentions(view: View) -> Iterator[_Attention]:
    for result in view.nodes("MatMul"):
        softmax = _back(result.inputs[0], PAIR)
        if softmax is None or softmax.op_type != "Softmax":
            continue
        between: list[ir.Node] = []
        value = softmax.inputs[0]
        while (node := _back(value)) is not None and node.op_type in {"Add", "Div", "Mul", "Where"}:
            between.append(node)
            value = _scores_side(view, node)
        # The softmax of a linear layer's output (CoaT takes that of k) is no attention.
        if node is not None and node.op_type == "MatMul" and not any(map(view.is_constant, node.inputs)):
            yield _Attention(node, result, tuple(between))


def _back(value: ir.Value | None, through: frozenset[str] = frozenset()) -> ir.Node | None:
    """Return the node that a value comes from, behind ops that move elements, Cast and ``through``."""
    node = None if value is None else value.producer()
    while node is not None and (moves(node) or node.op_type in through | {"Cast"}):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node


def _scores_side(view: View, node: ir.Node) -> ir.Value | None:
    """Return the operand that comes from the product, not the mask or factor."""
    dynamic = [value for value in node.inputs if value is not None and not view.is_constant(value)]
    products = [value for value in dynamic if (p := _back(value)) is not None and p.op_type in {"MatMul", "Mul", "Div"}]
    return next(iter(products or dynamic), None)
