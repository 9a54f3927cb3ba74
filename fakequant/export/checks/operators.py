"""Operators that TensorRT's parser refuses, or that have no integer kernel."""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.view import PAIR, View
from fakequant.export.graph import produced_by

_INTEGER_OPS = frozenset(
    {
        *("ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger"),
        *("MatMulIntegerToFloat", "QAttention", "QEmbedLayerNormalization", "QGemm"),
    }
)
_RECURRENT = ("LSTM", "GRU", "RNN")
_TAKE_UINT8 = PAIR | {"Cast", "Identity"}
_ONNX_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview.training"})


@check("R12", Severity.ERROR, "Export QuantizeLinear and DequantizeLinear of the ONNX standard around float ops")
def integer_operator(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt onnxOpCheckers.cpp; TensorRT makes integer kernels itself, out of Q/DQ."""
    for node in view.all_nodes:
        if is_integer(node):
            yield node, f"expected a float op between Q and DQ, got {full_name(node)}"


def is_integer(node: ir.Node) -> bool:
    """Whether a node computes in integers by itself, without Q/DQ around it."""
    if node.domain == "":
        return node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear")
    is_ours = node.domain == "com.microsoft"
    return is_ours and (node.op_type in _INTEGER_OPS | PAIR or node.op_type.startswith("QLinear"))


@check("R17", Severity.ERROR, "Rewrite the model without it")
def refused_form(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt onnxOpCheckers.cpp."""
    for node in view.nodes("MaxPool"):
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            yield node, "expected MaxPool with one output, got Indices too"
    for node in view.nodes("LSTM", "GRU", "RNN"):
        for attribute in ("layout", "input_forget"):
            if node.attributes.get_int(attribute, 0):
                yield node, f"expected {node.op_type} with {attribute}=0, got 1"
    for node in view.nodes("BatchNormalization"):
        if node.attributes.get_int("training_mode", 0):
            yield node, "expected BatchNormalization in inference, got training_mode=1"


@check("R17", Severity.ERROR, "Cast uint8 inputs to float first")
def computes_in_uint8(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt: UINT8 is a type of the network's inputs and outputs only."""
    for node in view.all_nodes:
        if node.domain != "" or node.op_type in _TAKE_UINT8 or is_integer(node):
            continue
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == ir.DataType.UINT8]
        if values and not produced_by(values[0], "QuantizeLinear"):
            yield node, f"expected uint8 only at inputs and outputs, got {node.op_type} on {values[0].name}"


@check("R46", Severity.WARNING, "Leave recurrent layers float")
def quantized_recurrent_layer(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt operators.md: FP32, FP16 and BF16 only."""
    for node in view.nodes(*_RECURRENT):
        number = sum(produced_by(value, "DequantizeLinear") is not None for value in node.inputs)
        if number:
            yield node, f"expected a float {node.op_type}, got Q/DQ on {number} of its inputs"


@check("R48", Severity.INFO, "Load a plugin for it, which has to take in the Q and DQ around it")
def custom_operator(view: View) -> Iterator[Fault]:
    """Source: TensorRT documentation on plugins and Q/DQ. Once for each op."""
    seen: set[tuple[str, str]] = set()
    for node in view.all_nodes:
        key = (node.domain, node.op_type)
        if node.domain not in _ONNX_DOMAINS and not is_integer(node) and key not in seen:
            seen.add(key)
            yield node, f"{full_name(node)} is not an ONNX op"


def full_name(node: ir.Node) -> str:
    """Return the op with its domain."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
