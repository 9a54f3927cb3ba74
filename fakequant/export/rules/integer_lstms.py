"""Write an LSTM with stored integer weights, and an input that each call quantizes anew, as DynamicQuantizeLSTM.

The operator of ONNX Runtime quantizes input and hidden state itself. It reads the weights as [directions, inputs,
4 * hidden], int8 with a scale for each output channel, and has no other zero point than 0 for them.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import QUANTIZER_KEY, constant_of, new_initializer, produced_by, quantized_in_call
from fakequant.export.kernels import ONNXRUNTIME_DOMAIN
from fakequant.export.rules.merge_quantizers import SEPARATOR

_W, _R, _BIAS, _COUNT = 1, 2, 3, 8
"""Inputs of LSTM, and how many there are. DynamicQuantizeLSTM has the grids of the weights behind them."""


class _Rows(NamedTuple):
    """Codes [directions * rows, inputs] and a scale a row."""

    codes: NDArray[np.generic]
    scale: NDArray[np.generic]


class IntegerLstms(ir.passes.InPlacePass):
    """Rewrites every such LSTM."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite."""
        modified = False
        for node in list(model.graph.all_nodes()):
            if node.domain or node.op_type != "LSTM" or node.attributes.get_int("layout", 0) != 0:
                continue
            quantized, w, r = quantized_in_call(node.inputs[0]), stored_rows(node, _W), stored_rows(node, _R)
            if quantized is not None and w is not None and r is not None:
                _rewrite(model, node, quantized, w, r)
                modified = True
        return ir.passes.PassResult(model, modified)


def stored_rows(lstm: ir.Node, index: int) -> _Rows | None:
    """Return a weight that is stored as integers, None for any other input."""
    reshape = produced_by(lstm.inputs[index], "Reshape") if index < len(lstm.inputs) else None
    dequantize = None if reshape is None else produced_by(reshape.inputs[0], "DequantizeLinear")
    if dequantize is None:
        return None
    codes, scale = constant_of(dequantize.inputs[0]), constant_of(dequantize.inputs[1])
    return None if codes is None or scale is None else _Rows(codes, scale)


def _rewrite(model: ir.Model, node: ir.Node, quantized: ir.Node, w: _Rows, r: _Rows) -> None:
    assert node.graph is not None
    w_codes, *w_grid = _constants(model.graph, node, "W", w)
    r_codes, *r_grid = _constants(model.graph, node, "R", r)
    others = [*node.inputs[_BIAS:], *[None] * (_COUNT - len(node.inputs))]
    integer = ir.Node(
        ONNXRUNTIME_DOMAIN,
        "DynamicQuantizeLSTM",
        [quantized.inputs[0], w_codes, r_codes, *others, *w_grid, *r_grid],
        [attribute for name, attribute in node.attributes.items() if name != "layout"],
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    names = (n.metadata_props.get(QUANTIZER_KEY, "").split(SEPARATOR) for n in (quantized, node))
    integer.metadata_props[QUANTIZER_KEY] = SEPARATOR.join(dict.fromkeys(name for of in names for name in of if name))
    for old, new in zip(node.outputs, integer.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    node.graph.insert_before(node, integer)
    ir.convenience.replace_all_uses_with(node.outputs, integer.outputs, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    model.opset_imports[ONNXRUNTIME_DOMAIN] = 1


def _constants(graph: ir.Graph, node: ir.Node, name: str, rows: _Rows) -> list[ir.Value]:
    """Add codes, scale and zero point as the operator reads them."""
    directions = 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1
    codes = rows.codes.reshape(directions, -1, rows.codes.shape[1]).transpose(0, 2, 1)
    scale = rows.scale.reshape(directions, -1)
    arrays = {"codes": codes, "scale": scale, "zero_point": np.zeros(scale.shape, codes.dtype)}
    return [new_initializer(graph, f"{node.name}.{name}.{role}", array) for role, array in arrays.items()]
