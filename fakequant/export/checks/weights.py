"""Weights: the channel axis of their scales, and the way from the constant to the op."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.paths import CONVOLUTIONS, WEIGHTED, dequantizers, moves, weight_quantizer
from fakequant.export.checks.view import FOUR_BITS, View
from fakequant.export.graph import produced_by


@check("1c", Severity.ERROR, "Quantize the weight again along its output channels, or with one scale")
def wrong_channel_axis(view: View) -> Iterator[Fault]:
    """Source: the table of axes: a scale along the summed axis cannot be applied to an integer sum."""
    for node in view.nodes(*WEIGHTED):
        dequantize = weight_quantizer(view, node)
        quantizer = None if dequantize is None else view.quantizer(dequantize)
        if quantizer is None or quantizer.is_per_tensor or quantizer.is_blocked or quantizer.axis is None:
            continue
        shape, axis = quantizer.data.shape, quantizer.axis
        if shape is None or not -shape.rank() <= axis < shape.rank():
            continue
        expected, axis = _channel_axis(node, shape.rank()), axis % shape.rank()
        if expected is None:
            yield node, f"expected one scale for the weight of a grouped ConvTranspose, got scales along axis {axis}"
        elif axis != expected:
            yield node, f"expected the scales of the weight {list(shape)} along axis {expected}, got axis {axis}"


def _channel_axis(node: ir.Node, rank: int) -> int | None:
    """Return the axis of output channels; None where no axis has them all.

    Of ConvTranspose it is that of TensorRT 10.2 and later; earlier ones differ among themselves.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        return 0
    return rank - 1


@check("1c", Severity.WARNING, "Leave embedding tables float")
def quantized_embedding(view: View) -> Iterator[Fault]:
    """Source: the table of axes: Gather has no integer kernel with a scale."""
    for node in view.nodes("Gather"):
        dequantize = produced_by(node.inputs[0], "DequantizeLinear")
        if dequantize is not None and view.is_constant(node.inputs[0]):
            yield node, f"expected a float table, got {view.quantizer(dequantize).data.name} behind DequantizeLinear"


@check("R14", Severity.ERROR, "Write kernel_shape on every convolution")
def kernel_shape_missing(view: View) -> Iterator[Fault]:
    """Source: importerUtils.cpp up to TensorRT 10.1 reads the size of a dequantized kernel from there only."""
    for node in view.nodes(*CONVOLUTIONS):
        if "kernel_shape" not in node.attributes and dequantizers(node.inputs[1]):
            yield node, "expected kernel_shape beside a quantized weight, got none: TensorRT up to 10.1 guesses"


@check("R15", Severity.WARNING, "Export it as Conv2d with kernel (k, 1), with Unsqueeze in front of Q")
def one_dimensional_convolution(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt puts a reshape between DQ and the convolution, which then cannot fuse."""
    for node in view.nodes(*CONVOLUTIONS):
        weight = node.inputs[1]
        if weight is not None and weight.shape is not None and weight.shape.rank() == 3 and dequantizers(weight):
            yield node, f"expected a 2-D convolution, got a quantized {node.op_type} with weight {list(weight.shape)}"


@check("R16", Severity.WARNING, "Do it to the stored constant, so that DequantizeLinear feeds the op")
def op_behind_weight(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: constant, Q, DQ, op; a Transpose behind DQ is the usual fault."""
    for node in view.nodes(*WEIGHTED):
        value, between = node.inputs[1], []
        while view.is_constant(value) and value is not None and (producer := value.producer()) is not None:
            if not (moves(producer) or producer.op_type == "Cast"):
                break
            between.append(producer.op_type)
            value = producer.inputs[0]
        if between and view.is_constant(value) and produced_by(value, "DequantizeLinear"):
            yield node, f"expected its weight straight from DequantizeLinear, got {', '.join(between)} between"


@check("R16", Severity.ERROR, "Store the 4-bit codes, with DequantizeLinear only")
def four_bits_quantized_at_run_time(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation: INT4 and FP4 weights are stored as such."""
    for quantizer in view.quantizers:
        if quantizer.is_quantize and quantizer.codes in FOUR_BITS and view.is_constant(quantizer.data):
            yield quantizer.node, f"expected a weight stored as {quantizer.codes}, got floats and QuantizeLinear"
