"""Pairs at ops without a weight: where they cost a kernel, or keep layers apart that would be fused."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.paths import (
    ACTIVATIONS,
    CONVOLUTIONS,
    activations,
    becomes_quantized,
    is_quantized,
    pads_zeros,
    quantized_convolution,
    same_shape,
)
from fakequant.export.checks.view import View
from fakequant.export.graph import produced_by

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
_FLOAT_INSIDE = (*_NORMS, "Erf", "Exp", "Gelu", "LogSoftmax", "Pow", "Softmax", "Sqrt")


@check("R32", Severity.WARNING, "Quantize behind the activation")
def pair_inside_a_fusion(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: convolution, BatchNorm and activation are one kernel unless a pair is between."""
    for node in view.nodes(*ACTIVATIONS):
        before = _quantize_before(node)
        source = None if before is None else view.quantizer(before).data.producer()
        if source is not None and source.op_type in CONVOLUTIONS | {"BatchNormalization"}:
            yield node, f"expected {node.op_type} right behind {source.op_type}, got Q/DQ between"


@check("R35", Severity.WARNING, "Quantize inputs and output, or nothing")
def quantized_on_one_side(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: "non-weighted layers with INT8 inputs also require INT8 outputs"."""
    for node in view.nodes("Add", "Mul", "Sub", *_AVERAGES):
        operands = activations(view, node)
        quantized = [is_quantized(value) for value in operands]
        if quantized and all(quantized) and not becomes_quantized(node.outputs[0]):
            yield node, f"expected Q/DQ behind {node.op_type} as in front of it, got a float output"
        elif sorted(quantized) == [False, True] and _both_needed(node, operands, quantized):
            name = operands[quantized.index(False)].name
            yield node, f"expected Q/DQ on both operands of {node.op_type} or on none, got {name} in float"


def _both_needed(node: ir.Node, operands: list[ir.Value], quantized: list[bool]) -> bool:
    """Whether the float operand is no gate (which is broadcast), nor fused into a convolution (rule R33)."""
    other = operands[quantized.index(False)]
    fused = node.op_type == "Add" and quantized_convolution(other) is not None
    return same_shape(*operands) and not fused


@check("R38", Severity.WARNING, "Quantize in front of the Pad")
def pair_behind_a_pad(view: View) -> Iterator[Fault]:
    """Source: TensorRT#2592: a Pad merges into the convolution unless a pair is between."""
    for quantizer in view.quantizers:
        pad = produced_by(quantizer.data, "Pad")
        if not quantizer.is_quantize or pad is None or not pads_zeros(pad):
            continue
        pairs = [node for node in quantizer.node.outputs[0].consumers() if node.op_type == "DequantizeLinear"]
        found = {reader.op_type for pair in pairs for reader in pair.outputs[0].consumers()}
        if found and found <= CONVOLUTIONS:
            yield quantizer.node, f"expected nothing between Pad and {min(found)}, got Q/DQ"


@check("R41", Severity.WARNING, "Leave it float inside: let it read the tensor in front of Q")
def pair_inside_a_norm(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer excludes them; LayerNorm behind a convolution is its exception."""
    for node in view.nodes(*_FLOAT_INSIDE):
        if not is_quantized(node.inputs[0]) or view.is_constant(node.inputs[0]):
            continue
        before = _quantize_before(node)
        source = None if before is None else produced_by(before.inputs[0], "Conv")
        if node.op_type != "LayerNormalization" or source is None:
            yield node, f"expected {node.op_type} in float, got Q/DQ on its input"


def _quantize_before(node: ir.Node) -> ir.Node | None:
    """Return the Q of the pair right in front of a node's first input."""
    dequantize = produced_by(node.inputs[0], "DequantizeLinear")
    return None if dequantize is None else produced_by(dequantize.inputs[0], "QuantizeLinear")
