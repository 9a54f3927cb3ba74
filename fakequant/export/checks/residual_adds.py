"""Residual adds: fused into the convolution on one side if the skip on the other is quantized (rule R33)."""

from collections.abc import Iterator

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.paths import (
    activations,
    becomes_quantized,
    is_quantized,
    quantized_convolution,
    same_shape,
)
from fakequant.export.checks.view import View
from fakequant.export.graph import produced_by


@check("R33", Severity.WARNING, "Quantize the skip, with the scale that its other readers use")
def float_skip(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: the skip's precision decides the output precision of the fused convolution."""
    for node in view.nodes("Add"):
        operands = activations(view, node)
        if len(operands) != 2 or not same_shape(*operands) or any(is_quantized(value) for value in operands):
            continue
        convolutions = [c for value in operands if (c := quantized_convolution(value)) is not None]
        if convolutions and becomes_quantized(node.outputs[0]):
            yield node, f"expected Q/DQ on the skip of the add behind {convolutions[0].name or 'a Conv'}, got float"


@check("R33", Severity.WARNING, "Take Q and DQ off the operand that comes out of the longer branch")
def both_operands_quantized(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: a pair between convolution and add makes the add a kernel of its own."""
    for node in view.nodes("Add"):
        pairs = [produced_by(value, "DequantizeLinear") for value in activations(view, node)]
        if len(pairs) != 2 or None in pairs:
            continue
        before = [produced_by(pair.inputs[0], "QuantizeLinear") for pair in pairs if pair is not None]
        fused = [q for q in before if q is not None and quantized_convolution(q.inputs[0]) is not None]
        if fused:
            yield (
                node,
                f"expected Q/DQ on the skip only, got it on both operands; {fused[0].name or 'one'} is in the way",
            )
