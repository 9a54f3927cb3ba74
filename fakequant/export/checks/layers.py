"""Convolutions and matrix products: quantized on both inputs, directly, and large enough."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.paths import CONVOLUTIONS, WEIGHTED, dequantizers, is_quantized, moves
from fakequant.export.checks.view import FLOATS, FOUR_BITS, View
from fakequant.export.graph import produced_by
from fakequant.placement.sizes import small_convolution, small_product

_OPERANDS = ("data", "weight or second input")


@check("R20", Severity.WARNING, "Take the Cast away: let the scale have the type of the data")
def cast_beside_a_pair(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer: "Cast nodes block TRT from fusing DQ into the MatMul"."""
    for node in view.nodes("Cast"):
        source = node.inputs[0]
        if source is None or source.dtype not in FLOATS or node.outputs[0].dtype not in FLOATS:
            continue
        pair = f"{source.dtype} to {node.outputs[0].dtype}"
        if produced_by(source, "DequantizeLinear") and not view.is_constant(source):
            yield node, f"expected DequantizeLinear right in front of its readers, got a Cast from {pair} between"
        if not view.is_constant(source) and any(r.op_type == "QuantizeLinear" for r in node.outputs[0].consumers()):
            yield node, f"expected QuantizeLinear right behind what it quantizes, got a Cast from {pair} between"


@check("R30", Severity.WARNING, "Quantize both inputs, or neither")
def one_quantized_input(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation, Q/DQ placement: with one, the op stays float and the pair is a kernel."""
    for node in view.nodes(*WEIGHTED):
        quantized = [is_quantized(value) for value in node.inputs[:2]]
        if quantized.count(True) == 1 and not _is_weight_only(view, node):
            with_pair, without = (_OPERANDS[quantized.index(state)] for state in (True, False))
            yield node, f"expected Q/DQ on both inputs, got it on its {with_pair} but not on its {without}"


def _is_weight_only(view: View, node: ir.Node) -> bool:
    """Whether only the weight is quantized, in 4 bits, which TensorRT wants so."""
    found = dequantizers(node.inputs[1])
    return bool(found) and view.is_constant(node.inputs[1]) and view.quantizer(found[0]).codes in FOUR_BITS


@check("R30", Severity.INFO, "Nothing to do if that is on purpose")
def float_layer(view: View) -> Iterator[Fault]:
    """A layer without Q/DQ that is large enough for it, in a file whose other layers have it."""
    layers = [node for node in view.nodes(*WEIGHTED) if view.is_constant(node.inputs[1])]
    if not any(is_quantized(node.inputs[0]) for node in layers):
        return
    for node in layers:
        bare = not any(is_quantized(value) for value in node.inputs[:2])
        if bare and not view.is_constant(node.inputs[0]) and _too_small(node) == "" and not _sees_one_pixel(node):
            yield node, f"this {node.op_type} has no Q/DQ and runs in float"


@check("R43", Severity.WARNING, "Leave it float: take Q and DQ off both inputs")
def small_quantized_product(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer, _MIN_MATMUL_DIM and GEMV."""
    yield from _small(view, "Gemm", "MatMul")


@check("R44", Severity.WARNING, "Leave it float: take Q and DQ off both inputs")
def small_quantized_convolution(view: View) -> Iterator[Fault]:
    """Source: Model-Optimizer, find_nodes_from_convs_to_exclude."""
    yield from _small(view, *CONVOLUTIONS)


def _small(view: View, *op_types: str) -> Iterator[Fault]:
    for node in view.nodes(*op_types):
        if view.is_constant(node.inputs[1]) and all(is_quantized(value) for value in node.inputs[:2]):
            reason = _too_small(node)
            if reason:
                yield node, f"expected a small {node.op_type} to stay float, got Q/DQ on it: {reason}"


def _too_small(node: ir.Node) -> str | None:
    """Return why a layer gains nothing from integers, "" if it may gain, None if the file does not say."""
    weight = node.inputs[1]
    if weight is None or weight.shape is None or not weight.shape.is_static() or weight.shape.rank() < 2:
        return None
    sizes = [int(size) for size in weight.shape.numpy()]
    if node.op_type == "MatMul":
        return small_product(sizes[-2], sizes[-1])
    if node.op_type == "Gemm":
        return small_product(*(reversed(sizes) if node.attributes.get_int("transB", 0) else sizes))
    groups, (first, second, *kernel) = node.attributes.get_int("group", 1), sizes
    is_first = _reads_the_input(node.inputs[0])
    if node.op_type == "Conv":
        return small_convolution(second, first, groups, kernel, is_first=is_first)
    return small_convolution(first // groups, second * groups, groups, kernel, is_first=is_first)


def _reads_the_input(value: ir.Value | None) -> bool:
    """Whether a value is an input of the graph, behind Q, DQ, Cast and ops that move elements or join parts."""
    while value is not None and (node := value.producer()) is not None:
        if not (moves(node) or node.op_type in {"QuantizeLinear", "DequantizeLinear", "Cast", "Concat"}):
            return False
        value = node.inputs[0]
    return True


def _sees_one_pixel(node: ir.Node) -> bool:
    """Whether a convolution's input has one pixel, as in a squeeze-and-excite gate: a matrix-vector product."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return node.op_type in CONVOLUTIONS and shape is not None and all(size == 1 for size in shape[2:])
