"""Write products of what each call quantizes anew in the forms that ONNX Runtime computes in integers.

With x = (q - z) s of DynamicQuantizeLinear, and a weight W = c t, t per column or per tensor::

    x @ W       = Cast(MatMulInteger(q, c, z)) * (s t)
    conv(x, W)  = Cast(ConvInteger(q, c + 128, z, 128)) * (s t)

The first, with an Add behind it, becomes one DynamicQuantizeMatMul. Of the second, the kernel for int8 weights
takes five times as long as that for uint8, and the grouped one longer than floats (measured for 1.31 on x86):
weights become uint8, and grouped convolutions stay. With x = r x', r one scale or one for each row::

    (r x') @ W  = r (x' @ W)

where both sides of x' @ W come from a DequantizeLinear, so that it is fused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import (
    QUANTIZER_KEY,
    along_axis,
    axis_of,
    constant_of,
    new_initializer,
    produced_by,
    quantized_in_call,
)

_EIGHT_BITS = (np.int8, np.uint8)
_ZERO = 128


class IntegerProducts(ir.passes.InPlacePass):
    """Rewrites every MatMul and Conv of a dynamically quantized tensor and a stored 8-bit weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite."""
        nodes = [node for node in model.graph if node.op_type in {"Conv", "MatMul"}]
        modified = [_rewrite(model.graph, node) for node in nodes]
        return ir.passes.PassResult(model, modified=any(modified))


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    weight = _stored_weight(node)
    if weight is None:
        return False
    product = _Product(graph, node, weight)
    if (quantized := quantized_in_call(node.inputs[0])) is not None:
        product.finish(product.in_integers(quantized))
    elif node.op_type == "MatMul" and (scaled := _scaled_rows(node.inputs[0])) is not None:
        product.finish(product.of_rows(*scaled))
    else:
        return False
    return True


class _Product:
    """One product on its way to become other nodes."""

    def __init__(self, graph: ir.Graph, node: ir.Node, weight: ir.Node) -> None:
        self._graph, self._node, self._weight = graph, node, weight
        self._is_conv = node.op_type == "Conv"
        self._tape = ir.tape.Tape()

    def in_integers(self, quantized: ir.Node) -> ir.Value:
        """Return the product of the outputs of a DynamicQuantizeLinear."""
        codes, scale, zero_point = quantized.outputs
        weight, steps = self._weight.inputs[:2]
        assert weight is not None
        assert steps is not None
        if self._is_conv:
            inputs = [codes, *self._unsigned(weight, zero_point)]
            product = self._op("ConvInteger", inputs, self._node.attributes)
            steps = self._per_channel(steps)
        else:
            product = self._op("MatMulInteger", [codes, weight, zero_point])
        made = product.producer()
        assert made is not None
        made.name = self._node.name
        made.metadata_props[QUANTIZER_KEY] = self._weight.metadata_props.get(QUANTIZER_KEY, "")
        floats = self._op("Cast", [product], {"to": ir.DataType.FLOAT})
        return self._op("Mul", [floats, self._op("Mul", [scale, steps])])

    def of_rows(self, data: ir.Value, rows: ir.Value) -> ir.Value:
        """Return the product of dequantized data, times the scale of each row."""
        return self._op("Mul", [self._op("MatMul", [data, self._weight.outputs[0]]), rows])

    def finish(self, result: ir.Value) -> None:
        """Add the bias and put the new nodes in the place of the product."""
        output = self._node.outputs[0]
        bias = self._node.inputs[2] if len(self._node.inputs) > 2 else None
        if bias is not None:
            result = self._op("Add", [result, self._per_channel(bias)])
        result.type, result.shape = output.type, output.shape
        self._graph.insert_before(self._node, self._tape.nodes)
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        if result.is_graph_output():
            result.name = output.name
        self._graph.remove(self._node, safe=True)

    def _unsigned(self, weight: ir.Value, zero_point: ir.Value) -> tuple[ir.Value, ...]:
        """Return a weight as uint8, the zero point of the data, and that of the weight."""
        codes = constant_of(weight)
        assert codes is not None
        shift = _ZERO if codes.dtype == np.int8 else 0
        shifted = (codes.astype(np.int16) + shift).astype(np.uint8)
        zero = new_initializer(self._graph, f"{weight.name}.zero_point", np.uint8(shift))
        return new_initializer(self._graph, f"{weight.name}.unsigned", shifted), zero_point, zero

    def _per_channel(self, value: ir.Value) -> ir.Value:
        """Return a constant with a number for each channel, shaped to broadcast against a convolution's output."""
        array = constant_of(value) if self._is_conv else None
        if array is None or array.ndim == 0:
            return value
        weight = constant_of(self._weight.inputs[0])
        assert weight is not None
        return new_initializer(self._graph, f"{value.name}.channels", along_axis(array, 1, weight.ndim))

    def _op(self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes, metadata_props=dict(self._node.metadata_props))


def _stored_weight(node: ir.Node) -> ir.Node | None:
    """Return the DequantizeLinear of a weight of 8 bits with zero point 0, if a rewrite knows it."""
    weight = produced_by(node.inputs[1], "DequantizeLinear")
    if weight is None or "block_size" in weight.attributes or node.attributes.get_int("group", 1) != 1:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_of(bias) is None:
        return None
    codes, scale = constant_of(weight.inputs[0]), constant_of(weight.inputs[1])
    zero_point = constant_of(weight.inputs[2]) if len(weight.inputs) > 2 else None
    if codes is None or scale is None or codes.dtype not in _EIGHT_BITS:
        return None
    channel = 0 if node.op_type == "Conv" else 1
    fits = axis_of(weight, scale) in (None, channel) and (node.op_type == "Conv" or codes.ndim == 2)
    return weight if fits and (zero_point is None or not zero_point.any()) else None


def _scaled_rows(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return dequantized values and the scale of all or of each of their rows, if a value is the product of both."""
    product = produced_by(value, "Mul")
    if product is None or not produced_by(product.inputs[0], "DequantizeLinear"):
        return None
    data, rows = product.inputs
    if data is None or rows is None or rows.shape is None or not (rows.shape.rank() == 0 or rows.shape[-1] == 1):
        return None
    return data, rows
