"""One ONNX LSTM, GRU or RNN as an op of torch, ``fakequant::recurrent``, and what both of torch's exporters make of it.

A weight in integers is ``fakequant::gate_rows``: a DequantizeLinear of the rows of both directions.

Its tensors are those of the ONNX op, gates in ONNX's order. The sequences that come out have
the directions side by side, as in torch: [T, N, features]. There are always three outputs;
without a cell state the third repeats the second.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch.onnx import symbolic_helper

from fakequant.export.torchscript import MIN_OPSET

_LIBRARY = torch.library.Library("fakequant", "FRAGMENT")
_LIBRARY.define(
    "recurrent(Tensor x, Tensor w, Tensor r, Tensor? b, Tensor? lengths, Tensor? h, Tensor? c, "
    "str mode, int directions, int hidden_size) -> (Tensor, Tensor, Tensor)"
)
# CONSERVATIVE: TorchScript must not compute it while it exports, as it does with what reads constants only.
_LIBRARY.define("gate_rows(Tensor codes, Tensor scale, int directions) -> Tensor", "CONSERVATIVE")

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""Which of torch's gates are those of ONNX, in ONNX's order: ifgo as iofg, rzn as zrn."""


def in_onnx_order(mode: str, rows: Tensor) -> Tensor:
    """Return a weight or bias of torch, or something else with a row for each of the outputs, with ONNX's gates."""
    order = _GATES.get(mode)
    if order is None:
        return rows
    size = len(rows) // len(order)
    return torch.cat([rows[gate * size : (gate + 1) * size] for gate in order])


def _of_its_shape(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the right shapes; only the graph is of interest."""
    *_, directions, hidden_size = arguments
    length, batch, _ = x.shape
    h, c = (x.new_zeros(directions, batch, hidden_size) for _ in range(2))
    return x.new_zeros(length, batch, directions * hidden_size), h, c


_LIBRARY.impl("recurrent", _of_its_shape, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrent", _of_its_shape, "Meta")


def _rows_of_their_shape(codes: Tensor, scale: Tensor, directions: int) -> Tensor:
    return scale.new_zeros(directions, len(codes) // directions, codes.shape[1])


_LIBRARY.impl("gate_rows", _rows_of_their_shape, "CompositeExplicitAutograd")
_LIBRARY.impl("gate_rows", _rows_of_their_shape, "Meta")

_ACTIVATIONS = {"RNN_TANH": "Tanh", "RNN_RELU": "Relu"}


def _node(*arguments: Any) -> tuple[str, list[Any], dict[str, Any]]:
    """Return type, inputs and attributes of the ONNX op."""
    *inputs, mode, directions, hidden_size = arguments
    attributes: dict[str, Any] = {"hidden_size": hidden_size, "direction": ["forward", "bidirectional"][directions - 1]}
    if mode == "LSTM":
        return mode, inputs, attributes
    if mode == "GRU":
        return mode, inputs[:-1], {**attributes, "linear_before_reset": 1}  # torch's formula
    return "RNN", inputs[:-1], {**attributes, "activations": [_ACTIVATIONS[mode]] * directions}


def _translation(*arguments: Any) -> tuple[Any, Any, Any]:
    """Return the outputs in a graph of the torch.export based exporter."""
    op_type, inputs, attributes = _node(*arguments)
    y, h, *c = getattr(op, op_type)(*inputs, **attributes)
    if attributes["direction"] == "forward":
        axes: Any = op.Constant(value_ints=[1])
        y = op.Squeeze(y, axes)
    else:
        shape: Any = op.Constant(value_ints=[0, 0, -1])
        y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), shape)
    return y, h, (c or [h])[0]


def _translation_of_rows(codes: Any, scale: Any, directions: int) -> Any:
    """Return [directions, rows, inputs] in a graph of the torch.export based exporter."""
    shape: Any = op.Constant(value_ints=[directions, -1, codes.shape[1]])
    return op.Reshape(op.DequantizeLinear(codes, scale, axis=0), shape)


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fakequant.recurrent.default: _translation,
    torch.ops.fakequant.gate_rows.default: _translation_of_rows,
}
"""For the custom_translation_table of torch.onnx.export."""


def _symbolic(g: Any, *arguments: Any) -> tuple[Any, Any, Any]:
    """Return the outputs in a TorchScript graph."""
    *tensors, mode, directions, hidden_size = arguments
    sizes = (symbolic_helper._get_const(value, "i", "size") for value in (directions, hidden_size))
    op_type, inputs, attributes = _node(*tensors, symbolic_helper._get_const(mode, "s", "mode"), *sizes)
    suffixes = {int: "i", str: "s", list: "s"}
    named = {f"{name}_{suffixes[type(value)]}": value for name, value in attributes.items()}
    y, h, *c = g.op(op_type, *inputs, outputs=3 if op_type == "LSTM" else 2, **named)
    if attributes["direction"] == "forward":
        y = g.op("Squeeze", y, g.op("Constant", value_t=torch.tensor([1])))
    else:
        y = g.op("Transpose", y, perm_i=[0, 2, 1, 3])
        y = g.op("Reshape", y, g.op("Constant", value_t=torch.tensor([0, 0, -1])))
    return y, h, (c or [h])[0]


torch.onnx.register_custom_op_symbolic("fakequant::recurrent", _symbolic, MIN_OPSET)


@symbolic_helper.parse_args("v", "v", "i")
def _symbolic_of_rows(g: Any, codes: Any, scale: Any, directions: int) -> Any:
    """Return [directions, rows, inputs] in a TorchScript graph."""
    shape = torch.tensor([directions, -1, codes.type().sizes()[1]])
    return g.op("Reshape", g.op("DequantizeLinear", codes, scale, axis_i=0), g.op("Constant", value_t=shape))


torch.onnx.register_custom_op_symbolic("fakequant::gate_rows", _symbolic_of_rows, MIN_OPSET)
