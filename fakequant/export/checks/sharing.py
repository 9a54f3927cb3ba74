"""One quantizer for one tensor, and one scale for what is only moved (rules R34, R36, R37)."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check, described
from fakequant.export.checks.paths import dequantizers, moves, readers
from fakequant.export.checks.view import View
from fakequant.export.graph import produced_by


@check("R34", Severity.WARNING, "Share one Q and its DQ among all readers of the tensor")
def unequal_quantizers(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer, DedicatedQDQPair=False: two scales on one tensor are two reformats."""
    first: dict[ir.Value, ir.Node] = {}
    for quantizer in view.quantizers:
        if not quantizer.is_quantize or quantizer.scale is None:
            continue
        kept = first.setdefault(quantizer.data, quantizer.node)
        if kept is not quantizer.node and not view.quantizer(kept).same_grid(quantizer):
            got = [f"{view.quantizer(node).codes} with {_scales(view, (node,))}" for node in (kept, quantizer.node)]
            yield quantizer.node, f"expected one quantizer on {quantizer.data.name}, got {' and '.join(got)}"


@check("R36", Severity.WARNING, "Use one scale in front of it and behind")
def rescaled_move(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: Q and DQ pass ops that only move elements if their scales are equal."""
    for quantizer in view.quantizers:
        node = quantizer.data.producer()
        if not quantizer.is_quantize or node is None or produced_by(quantizer.data, "Concat"):
            continue
        before = dequantizers(quantizer.data)
        if len(before) == 1 and not _equal(view, before[0], quantizer.node):
            moved = f"{node.op_type} on both sides" if moves(node) else "a pair behind a pair"
            yield quantizer.node, f"expected one scale, {moved}, got {_scales(view, (before[0], quantizer.node))}"


@check("R37", Severity.WARNING, "Give all inputs and the output of the Concat one scale, the largest")
def rescaled_concat(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer, get_concat_eliminated_tensors."""
    for node in view.nodes("Concat"):
        before = [pair for value in node.inputs for pair in dequantizers(value)]
        behind = [reader for reader in readers(node.outputs[0]) if reader.op_type == "QuantizeLinear"]
        pairs = (*before, *behind)
        if before and any(not _equal(view, pairs[0], pair) for pair in pairs[1:]):
            yield node, f"expected one scale on all inputs and the output, got {_scales(view, pairs)}"


@check("1f", Severity.WARNING, "Put DequantizeLinear behind it, or take it away")
def quantize_without_dequantize(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: Q and DQ come in pairs; only plugins take codes."""
    for quantizer in view.quantizers:
        if not quantizer.is_quantize:
            continue
        found = quantizer.node.outputs[0].consumers()
        if not any(reader.op_type == "DequantizeLinear" or reader.domain != "" for reader in found):
            got = ", ".join(dict.fromkeys(described(reader) for reader in found)) or "no reader"
            yield quantizer.node, f"expected DequantizeLinear behind it, got {got}"


def _equal(view: View, one: ir.Node, other: ir.Node) -> bool:
    """Whether two pairs have one scale; True where a scale is not constant (rule R5)."""
    scales = view.quantizer(one).scale, view.quantizer(other).scale
    if scales[0] is None or scales[1] is None:
        return True
    return scales[0].size == scales[1].size and bool((scales[0].ravel() == scales[1].ravel()).all())


def _scales(view: View, nodes: tuple[ir.Node, ...]) -> str:
    found = [view.quantizer(node).scale for node in nodes]
    words = [f"{s.ravel()[0]:.6g}" if s.size == 1 else f"{s.size} scales" for s in found if s is not None]
    return ", ".join(dict.fromkeys(words))
