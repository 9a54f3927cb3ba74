"""Look rows up among the codes of a table, and dequantize only those: DQ -> Gather becomes Gather -> DQ.

ONNX Runtime would dequantize the whole table in each run. DequantizeLinear has no scale of
its own for each row that was looked up, so with a range per row it is written out::

    Gather(DQ(codes, scale), rows) = Cast(Gather(codes, rows)) * Gather(scale, rows)
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import axis_of, constant_of, new_initializer, remove_unread, table_look_ups

CODES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
"""Types of tables that stay codes."""


class GatherCodes(ir.passes.InPlacePass):
    """Rewrites every Gather along the rows of a stored table."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite, unless the table has blocks, or codes of other sizes than 8 bits."""
        modified = False
        for dequantize, look_ups in list(table_look_ups(model.graph)):
            codes, scale = dequantize.inputs[:2]
            assert codes is not None
            array = constant_of(scale)
            if codes.dtype not in CODES or array is None or "block_size" in dequantize.attributes:
                continue
            modified = True
            axis = axis_of(dequantize, array)
            parameters = _rows(model.graph, dequantize, array) if axis == 0 else None
            for gather in look_ups:
                _Rewrite(gather, dequantize).run(parameters, axis)
            remove_unread(model.graph, dequantize)
        return ir.passes.PassResult(model, modified)


def _rows(graph: ir.Graph, dequantize: ir.Node, scale: NDArray[np.generic]) -> list[ir.Value]:
    """Return scales of the table's rank, and zero points as floats if any is not 0."""
    codes, _, *given = dequantize.inputs
    assert codes is not None
    assert codes.shape is not None
    shape = (-1, *[1] * (len(codes.shape) - 1))
    rows = [new_initializer(graph, f"{codes.name}.scale", scale.reshape(shape))]
    zero_point = constant_of(given[0]) if given else None
    if zero_point is not None and zero_point.any():
        rows.append(new_initializer(graph, f"{codes.name}.zero_point", zero_point.astype(scale.dtype).reshape(shape)))
    return rows


class _Rewrite:
    """One look-up."""

    def __init__(self, gather: ir.Node, dequantize: ir.Node) -> None:
        self._gather, self._dequantize = gather, dequantize
        self._output, self._indices = gather.outputs[0], gather.inputs[1]
        self._tape = ir.tape.Tape()

    def run(self, rows: list[ir.Value] | None, axis: int | None) -> None:
        """Replace it, by two or more look-ups if there are parameters for each row."""
        codes, scale, *zero_point = self._dequantize.inputs
        assert codes is not None
        assert codes.shape is not None
        found = self._looked_up(codes)
        if rows is None:
            # Counted from the back, an axis of the table is the same one of what is looked up.
            attributes = {} if axis is None else {"axis": axis - len(codes.shape)}
            values = self._op("DequantizeLinear", [found, scale, *zero_point], attributes)
        else:
            values = self._op("Cast", [found], {"to": self._output.dtype})
            scales, *zero_points = (self._looked_up(row) for row in rows)
            for zeros in zero_points:
                values = self._op("Sub", [values, zeros])
            values = self._op("Mul", [values, scales])
        self._replace(values)

    def _looked_up(self, table: ir.Value) -> ir.Value:
        made = self._tape.op("Gather", [table, self._indices], {"axis": 0})
        made.type = table.type
        if self._output.shape is not None and table.shape is not None:
            behind = table.shape[1:]
            made.shape = ir.Shape([*self._output.shape[: len(self._output.shape) - len(behind)], *behind])
        return made

    def _op(self, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, Any] | None = None) -> ir.Value:
        made = self._tape.op(op_type, inputs, attributes)
        made.type, made.shape = self._output.type, self._output.shape
        return made

    def _replace(self, values: ir.Value) -> None:
        base = self._gather.name or self._output.name
        for number, node in enumerate(self._tape.nodes):
            node.name = f"{base}.{node.op_type}" + (f".{number}" if number else "")
            node.metadata_props.update(self._gather.metadata_props)
        last = values.producer()
        assert last is not None
        assert self._gather.graph is not None
        last.metadata_props.update(self._dequantize.metadata_props)
        self._gather.graph.insert_before(self._gather, self._tape.nodes)
        name = self._output.name
        ir.convenience.replace_all_uses_with(self._output, values, replace_graph_outputs=True)
        self._gather.graph.remove(self._gather, safe=True)
        values.name = name
