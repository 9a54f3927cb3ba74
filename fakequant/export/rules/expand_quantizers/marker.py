"""One marker, and the nodes that take its place."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY, along_axis, new_initializer
from fakequant.nn import TensorQuantizer
from fakequant.onnx_ops import channel_axis


class Parameters(NamedTuple):
    """Scale and zero point of a Q and its DQ.

    Attributes:
        scale: constant, or computed in the graph.
        zero_point: the same; its type is that of the codes.
        attributes: ``axis`` and ``block_size`` as far as there are any.
    """

    scale: ir.Value
    zero_point: ir.Value
    attributes: Mapping[str, int]


class Marker:
    """One marker on its way to become other nodes.

    Args:
        node: the marker.
        quantizer: that it stands for.
        opset: of the model.

    Attributes:
        name: of the quantizer.
        data: what is quantized.
        grid: of the quantizer.
    """

    def __init__(self, node: ir.Node, quantizer: TensorQuantizer, opset: int) -> None:
        assert node.graph is not None
        assert node.inputs[0] is not None
        self._node, self._graph = node, node.graph
        self.name = node.attributes["name"].as_string()
        self._tape = ir.tape.Tape()
        self.data = node.inputs[0]
        self.quantizer, self.grid, self.opset = quantizer, quantizer.descriptor, opset

    def replace_by(self, values: ir.Value) -> None:
        """Put the new nodes into the graph and let everything that reads the marker read values."""
        output = self._node.outputs[0]
        values = self.cast(values, output.dtype)
        self._graph.insert_before(self._node, self._tape.nodes)
        ir.convenience.replace_all_uses_with(output, values, replace_graph_outputs=True)
        if values.is_graph_output():
            values.name = output.name
        self._graph.remove(self._node, safe=True)

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """Add a node of floats; it is taken to have the shape of the data."""
        made = self._tape.op(op_type, inputs, attributes, metadata_props={MODULE_KEY: self.name})
        return self._typed(made, ir.DataType.FLOAT)

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Return a value in a type."""
        if dtype is None or value.dtype == dtype:
            return value
        made = self._tape.op("Cast", [value], {"to": dtype}, metadata_props={MODULE_KEY: self.name})
        return self._typed(made, dtype)

    def floats(self) -> ir.Value:
        """Return the data in float32."""
        return self.cast(self.data, ir.DataType.FLOAT)

    def constant(self, role: str, array: NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
        """Add an initializer that is named after the quantizer."""
        return new_initializer(self._graph, f"{self.name}.{role}", array, dtype)

    def codes(self, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """Add an initializer that is named after the data."""
        return new_initializer(self._graph, f"{self.data.name}.codes", array, dtype)

    def parameters(self, scale: Tensor, zero_point: Tensor | None, dtype: ir.DataType) -> Parameters:
        """Add constant parameters for codes of a type; scale has the shape of the quantizer's range."""
        scale = scale.detach().cpu()
        axis, attributes = self._axis(scale)
        shape: tuple[int, ...] = tuple(scale.shape)
        if self.grid.block_size is None:
            shape = () if axis is None else (-1,)
        scales = scale.reshape(shape).numpy()
        zeros = np.zeros_like(scales) if zero_point is None else zero_point.detach().cpu().reshape(shape).numpy()
        return Parameters(
            self.constant("scale", scales), self.constant("zero_point", zeros.astype(dtype.numpy()), dtype), attributes
        )

    def broadcast(self, parameter: Tensor) -> NDArray[np.generic]:
        """Return a scale or zero point per tensor or channel, shaped to broadcast against the data."""
        axis, _ = self._axis(parameter)
        flat = parameter.detach().cpu().reshape(() if axis is None else (-1,)).numpy()
        return along_axis(flat, axis, 0 if self.data.shape is None else len(self.data.shape))

    def quantize(self, data: ir.Value, parameters: Parameters) -> ir.Value:
        """Add a QuantizeLinear that bears the name of the quantizer."""
        assert parameters.zero_point.dtype is not None
        inputs = [data, parameters.scale, parameters.zero_point]
        return self._typed(self._named("QuantizeLinear", inputs, parameters.attributes)[0], parameters.zero_point.dtype)

    def dequantize(self, codes: ir.Value, parameters: Parameters) -> ir.Value:
        """Add a DequantizeLinear that bears the name of the quantizer."""
        inputs = [codes, parameters.scale, parameters.zero_point]
        return self._typed(self._named("DequantizeLinear", inputs, parameters.attributes)[0], ir.DataType.FLOAT)

    def quantize_dynamically(self, data: ir.Value) -> tuple[ir.Value, Parameters]:
        """Add a DynamicQuantizeLinear that bears the name of the quantizer."""
        codes, scale, zero_point = self._named("DynamicQuantizeLinear", [data], {}, outputs=3)
        for value, dtype in ((scale, ir.DataType.FLOAT), (zero_point, ir.DataType.UINT8)):
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(())
        return self._typed(codes, ir.DataType.UINT8), Parameters(scale, zero_point, {})

    def _named(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int], outputs: int = 1
    ) -> Sequence[ir.Value]:
        call = self._node.metadata_props.get(CALL_KEY, "0")
        name = f"{self.name}.{op_type}" + ("" if call == "0" else f".{int(call) + 1}")
        keys = {MODULE_KEY: self.name, QUANTIZER_KEY: self.name, CALL_KEY: call}
        made = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, name=name, metadata_props=keys)
        for value, role in zip(made, ("output", "scale", "zero_point"), strict=False):
            value.name = f"{name}.{role}"
        return made

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        value.type, value.shape = ir.TensorType(dtype), self.data.shape
        return value

    def _axis(self, scale: Tensor) -> tuple[int | None, Mapping[str, int]]:
        """Return the axis of a scale's channels, None per tensor or in blocks; and the attributes that say it."""
        rank = None if self.data.shape is None else len(self.data.shape)
        if self.grid.block_size is not None:
            axis = self.grid.block_axis if rank is None else self.grid.block_axis % rank
            return None, {"axis": axis, "block_size": self.grid.block_size}
        channel = channel_axis(scale)
        if channel is not None and rank is not None and rank != scale.ndim:
            # amax of another rank than the data, such as [C] for [N, C]: where the descriptor says.
            assert isinstance(self.grid.axis, int)
            channel = self.grid.axis % rank
        return channel, {} if channel is None else {"axis": channel}
