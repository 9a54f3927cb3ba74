"""Make QuantizeLinear and DequantizeLinear of the markers that were traced in place of quantizers.

A constant of an integer grid is stored as codes with a DQ only: computed once, with the
formula of fakequant.arithmetic and the bounds of the quantizer, which may be narrower than
the ONNX type's (4 bits in int8; -127 as the lowest int8 weight). Everything else gets the
pair, and a clamp in front of it where the grid is narrower than its type.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fakequant import arithmetic
from fakequant.export.graph import CALL_KEY, DOMAIN, MODULE_KEY, QUANTIZER_KEY, along_axis, constant_of, new_initializer
from fakequant.nn import TensorQuantizer
from fakequant.onnx_ops import channel_axis, container


class ExpandQuantizers(ir.passes.InPlacePass):
    """Replaces every marker.

    Args:
        quantizers: by name, as traced.
    """

    def __init__(self, quantizers: Mapping[str, TensorQuantizer]) -> None:
        super().__init__()
        self._quantizers = quantizers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        markers = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
        stored: _Stored = {}
        for marker in markers:
            _Expansion(marker, self._quantizers[marker.attributes["name"].as_string()], stored).run()
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(markers))


_Stored: TypeAlias = dict[tuple[ir.Value, bytes, tuple[int, int]], ir.Value]
"""Codes by weight, scale and bounds: those of a weight that two layers tie are stored once."""


class _Expansion:
    """One marker on its way to become Q and DQ."""

    def __init__(self, marker: ir.Node, quantizer: TensorQuantizer, stored: _Stored) -> None:
        assert marker.graph is not None
        assert marker.inputs[0] is not None
        assert quantizer.scale is not None
        self._marker, self._quantizer, self._all_stored = marker, quantizer, stored
        self._graph, self._data = marker.graph, marker.inputs[0]
        self._name = marker.attributes["name"].as_string()
        self._named = {MODULE_KEY: self._name}
        self._tape = ir.tape.Tape()
        scale = quantizer.scale.detach().cpu()
        self._axis = self._channel_axis(scale)
        self._scale = scale.reshape(() if self._axis is None else (-1,)).numpy()
        self._dtype, self._needs_clip = _container(quantizer)
        zero_point = np.zeros(self._scale.shape, self._dtype.numpy())
        self._parameters = (
            new_initializer(self._graph, f"{self._name}.scale", self._scale),
            new_initializer(self._graph, f"{self._name}.zero_point", zero_point, self._dtype),
        )

    def run(self) -> None:
        output = self._marker.outputs[0]
        weight = None if self._quantizer.descriptor.is_fp8 else constant_of(self._data)
        codes = self._quantized() if weight is None else self._stored(weight)
        values = self._cast(self._emit("DequantizeLinear", codes, ir.DataType.FLOAT), output.dtype)
        self._graph.insert_before(self._marker, self._tape.nodes)
        ir.convenience.replace_all_uses_with(output, values, replace_graph_outputs=True)
        if values.is_graph_output():
            values.name = output.name
        self._graph.remove(self._marker, safe=True)

    def _quantized(self) -> ir.Value:
        data = self._cast(self._data, ir.DataType.FLOAT)
        if self._needs_clip:
            lowest, highest = self._quantizer.bounds
            for op_type, code in (("Max", lowest), ("Min", highest)):
                bound = np.multiply(np.float32(code), self._steps(data))
                operands = [data, new_initializer(self._graph, f"{self._name}.{op_type}", bound)]
                data = self._typed(self._tape.op(op_type, operands, metadata_props=self._named), ir.DataType.FLOAT)
        return self._emit("QuantizeLinear", data, self._dtype)

    def _stored(self, weight: NDArray[np.generic]) -> ir.Value:
        key = self._data, self._scale.tobytes(), self._quantizer.bounds
        if key not in self._all_stored:
            steps = torch.from_numpy(np.asarray(self._steps(self._data)))
            values = torch.from_numpy(np.require(weight, requirements="W"))  # that of a Constant is read-only
            codes = arithmetic.quantize(values, steps, *self._quantizer.bounds).numpy()
            name = f"{self._data.name}.codes"
            self._all_stored[key] = new_initializer(self._graph, name, codes.astype(self._dtype.numpy()))
        return self._all_stored[key]

    def _emit(self, op_type: str, data: ir.Value, dtype: ir.DataType) -> ir.Value:
        call = self._marker.metadata_props.get(CALL_KEY, "0")
        name = f"{self._name}.{op_type}" + ("" if call == "0" else f".{int(call) + 1}")
        keys = {**self._named, QUANTIZER_KEY: self._name, CALL_KEY: call}
        attributes = {} if self._axis is None else {"axis": self._axis}
        made = self._tape.op(op_type, [data, *self._parameters], attributes, name=name, metadata_props=keys)
        made.name = f"{name}.output"
        return self._typed(made, dtype)

    def _cast(self, data: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        if dtype is None or data.dtype == dtype:
            return data
        return self._typed(self._tape.op("Cast", [data], {"to": dtype}, metadata_props=self._named), dtype)

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        value.type, value.shape = ir.TensorType(dtype), self._data.shape
        return value

    def _steps(self, data: ir.Value) -> NDArray[np.generic]:
        """Return the scale shaped to broadcast against data."""
        return along_axis(self._scale, self._axis, 0 if data.shape is None else len(data.shape))

    def _channel_axis(self, scale: torch.Tensor) -> int | None:
        axis = channel_axis(scale)
        if axis is None or self._data.shape is None or len(self._data.shape) == scale.ndim:
            return axis
        # amax of another rank than the data, such as [C] for [N, C]: where the descriptor says.
        assert isinstance(self._quantizer.axis, int)
        return self._quantizer.axis % len(self._data.shape)


def _container(quantizer: TensorQuantizer) -> tuple[ir.DataType, bool]:
    """Return the ONNX type of the codes, and whether the grid is narrower."""
    if quantizer.descriptor.is_fp8:
        return ir.DataType.FLOAT8E4M3FN, False
    dtype, needs_clip = container(*quantizer.bounds)
    return ir.DataType[str(dtype).removeprefix("torch.").upper()], needs_clip
