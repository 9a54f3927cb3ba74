"""Write the types of a float16 or bfloat16 graph, given what stays float32, and what stands between two types."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.checks.view import PAIR
from fakequant.export.graph import MODULE_KEY, along_axis, axis_of, constant_of, new_initializer
from fakequant.export.rules.float_dtype.float32_nodes import Float32Nodes, is_float32
from fakequant.export.rules.float_dtype.float_numbers import FloatNumbers
from fakequant.export.rules.float_dtype.op_types import OpTypes

_FLOAT = ir.DataType.FLOAT
_TYPE_ATTRIBUTES = ("dtype", "output_datatype", "to")
_DEFAULTS = {
    "ConstantOfShape": ir.AttrTensor("value", ir.tensor([0.0], ir.DataType.FLOAT)),
    **{op_type: ir.AttrInt64("dtype", _FLOAT) for op_type in ("RandomNormal", "RandomUniform")},
    **{
        op_type: ir.AttrInt64("output_datatype", _FLOAT)
        for op_type in ("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix")
    },
}
"""What makes the outputs of an op float32 where it is not written."""


class TypeFloats:
    """One graph on its way to another float type.

    Args:
        model: changed by ``run``.
        kept: what stays float32.
        numbers: of the type.
    """

    def __init__(self, model: ir.Model, kept: Float32Nodes, numbers: FloatNumbers) -> None:
        self._kept, self._numbers = kept, numbers
        self._types = OpTypes(model.opset_imports)
        self._nodes = tuple(model.graph.all_nodes())
        self._graphs = _types_of_graphs(model, kept, numbers.dtype)
        self._floats = {value for graph in self._graphs for value in _values(graph) if is_float32(value)}
        self._clamped: dict[str, str] = {}
        self._exact: dict[ir.Value, NDArray[np.generic]] = {}
        self._recoded: set[ir.Value] = set()
        self._in_the_other_type: dict[ir.Value, ir.Value] = {}

    def run(self) -> dict[str, str]:
        """Change types and constants, insert Casts, and return {where: what became of a constant beyond the type}."""
        self._type_what_is_computed()
        for graph in self._graphs:
            for value in graph.initializers.values():
                if value in self._floats and self._numbers.dtype in (wanted := self._wanted_of(value)):
                    self._store(value, also_exact=_FLOAT in wanted)
        for node in self._nodes:
            for index, read in enumerate(node.inputs):
                if read is not None and read in self._floats:
                    node.replace_input_with(index, self._as(read, self._wanted(node, index, read)))
        for graph, dtype in self._graphs.items():
            self._type_results(graph, dtype)
        self._drop_casts()
        return self._clamped

    def _type_what_is_computed(self) -> None:
        """Give inputs and outputs of nodes their types; those of DQ at last, which depend on who reads them."""
        for graph, dtype in self._graphs.items():
            for value in graph.inputs:
                if value in self._floats and value not in self._kept.values:
                    _set_type(value, dtype)
        dequantizers = [node for node in self._nodes if node.op_type == "DequantizeLinear"]
        for node in self._nodes:
            if node.op_type != "DequantizeLinear":
                self._type_outputs(node)
        for node in dequantizers:
            if self._numbers.dtype in self._wanted_of(node.outputs[0]):
                _set_type(node.outputs[0], self._numbers.dtype)

    def _type_outputs(self, node: ir.Node) -> None:
        dtype = self._numbers.dtype
        if node in self._kept.nodes or not any(output in self._floats for output in node.outputs):
            return
        for index, output in enumerate(node.outputs):
            if output in self._floats and self._types.gives(node, index, dtype):
                _set_type(output, dtype)
        if node.op_type in _DEFAULTS:
            node.attributes.setdefault(_DEFAULTS[node.op_type].name, _DEFAULTS[node.op_type])
        for attribute in list(node.attributes.values()):
            if attribute.name in _TYPE_ATTRIBUTES and attribute.value == _FLOAT:
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, dtype)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _FLOAT:
                tensor = ir.tensor(self._stored(attribute.as_tensor().numpy(), place_of(node)), dtype=dtype)
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)

    def _wanted_of(self, value: ir.Value) -> set[ir.DataType]:
        """Return the types that the readers of a constant or DQ want."""
        wanted = {self._wanted(node, index, value) for node, index in value.uses()}
        return wanted | {self._numbers.dtype} if value.is_graph_output() else wanted

    def _wanted(self, node: ir.Node, index: int, value: ir.Value) -> ir.DataType:
        """Return the type in which a node reads a value that was float32."""
        if node.op_type == "DequantizeLinear":
            return node.outputs[0].dtype or _FLOAT
        if node.op_type == "QuantizeLinear" and index == 1:
            assert node.inputs[0] is not None
            return self._wanted(node, 0, node.inputs[0])
        if node.op_type == "QuantizeLinear" and not _has_any_type(value):
            return value.dtype or _FLOAT
        stays = node in self._kept.nodes or not self._types.takes(node, index, self._numbers.dtype)
        return _FLOAT if stays else self._numbers.dtype

    def _store(self, value: ir.Value, also_exact: bool) -> None:
        """Store a constant in the type."""
        array = constant_of(value)
        assert array is not None
        readers = [node for node, index in value.uses() if node.op_type in PAIR and index == 1]
        if readers:
            raised = np.maximum(array, self._numbers.least_scale)
            if (raised != array).any():
                self._recode(readers, array, raised)
            stored = self._numbers.stored(raised)
        else:
            stored = self._stored(array, next(map(place_of, value.consumers()), str(value.name)))
            if also_exact:
                self._exact[value] = array
        value.const_value = ir.tensor(stored, dtype=self._numbers.dtype, name=value.name)
        _set_type(value, self._numbers.dtype)

    def _stored(self, array: NDArray[np.generic], place: str) -> NDArray[np.generic]:
        """Return a constant in the type, and note a number of it that the type does not hold."""
        stored = self._numbers.stored(array)
        if (odd := self._numbers.clamped(array)).any():
            self._clamped.setdefault(place, f"{array[odd][0]:.6g} became {stored[odd][0]:.6g}")
        return stored

    def _recode(self, readers: list[ir.Node], scale: NDArray[np.generic], raised: NDArray[np.generic]) -> None:
        """Give stored weights the codes that belong to a larger scale."""
        for node in readers:
            stored = node.inputs[0]
            codes = constant_of(stored)
            if node.op_type != "DequantizeLinear" or stored is None or codes is None or stored in self._recoded:
                continue
            self._recoded.add(stored)
            ratio = along_axis(np.divide(scale, raised), axis_of(node, scale), codes.ndim)
            recoded = np.rint(np.multiply(codes, ratio, dtype=np.float64)).astype(codes.dtype)
            stored.const_value = ir.tensor(recoded, dtype=stored.dtype, name=stored.name)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in a type, of the two that there are."""
        if value.dtype == dtype:
            return value
        if value not in self._in_the_other_type:
            self._in_the_other_type[value] = self._converted(value, dtype)
        return self._in_the_other_type[value]

    def _converted(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        maker, graph, name = value.producer(), value.graph, f"{value.name}.{_name(dtype)}"
        assert isinstance(graph, ir.Graph)
        if value.is_initializer():
            # Of a scale, what the other one of the pair has; of other constants, all digits.
            array = self._exact.get(value, constant_of(value))
            assert array is not None
            return new_initializer(graph, name, array.astype(dtype.numpy()))
        if maker is not None and maker.op_type == "DequantizeLinear":
            codes, scale, *zero_point = maker.inputs
            assert scale is not None
            inputs, attributes = [codes, self._as(scale, dtype), *zero_point], dict(maker.attributes)
            made = ir.node("DequantizeLinear", inputs, attributes, metadata_props=dict(maker.metadata_props))
            made.name = f"{maker.name or value.name}.{_name(dtype)}"
        else:
            made = ir.node("Cast", [value], {"to": dtype}, name=f"{name}.Cast")
            if maker is not None and MODULE_KEY in maker.metadata_props:
                made.metadata_props[MODULE_KEY] = maker.metadata_props[MODULE_KEY]
        made.outputs[0].name, made.outputs[0].shape = name, value.shape
        _set_type(made.outputs[0], dtype)
        if maker is not None:
            graph.insert_after(maker, made)
        else:
            graph.insert_before(graph[0], made)
        return made.outputs[0]

    def _type_results(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        """Give the outputs of a graph its type, under their names."""
        for index, value in enumerate(graph.outputs):
            if value not in self._floats or value.dtype == dtype or value in self._kept.values:
                continue
            result = self._as(value, dtype)
            value.name, result.name = f"{value.name}.{_name(value.dtype)}", value.name
            graph.outputs[index] = result

    def _drop_casts(self) -> None:
        """Take away Casts from a type to itself."""
        for node in self._nodes:
            source, output = (node.inputs[0], node.outputs[0]) if node.op_type == "Cast" else (None, None)
            if source is None or output is None or source.dtype != output.dtype or output.is_graph_output():
                continue
            ir.convenience.replace_all_uses_with(output, source)
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _types_of_graphs(model: ir.Model, kept: Float32Nodes, dtype: ir.DataType) -> dict[ir.Graph, ir.DataType]:
    """Return the type of the inputs and outputs of each graph; of a body, that of the node that has it."""
    types = {model.graph: dtype}
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                types[attribute.as_graph()] = _FLOAT if node in kept.nodes else dtype
    return types


def place_of(node: ir.Node) -> str:
    """Return the module that a node comes from, or its name."""
    return node.metadata_props.get(MODULE_KEY) or node.name or node.op_type


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values that a graph itself has."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _has_any_type(value: ir.Value) -> bool:
    """Whether a value can be had in any type without a Cast: a constant, or what DQ gives."""
    maker = value.producer()
    return value.is_initializer() or (maker is not None and maker.op_type == "DequantizeLinear")


def _name(dtype: ir.DataType | None) -> str:
    return "float32" if dtype is None or dtype == _FLOAT else dtype.name.lower()


def _set_type(value: ir.Value, dtype: ir.DataType) -> None:
    """Give a value a type of its own; onnx_ir lets values share the object."""
    value.type = _with(value.type, dtype)


def _with(old: ir.TypeProtocol | None, dtype: ir.DataType) -> ir.TypeProtocol:
    if isinstance(old, (ir.SequenceType, ir.OptionalType)):
        return type(old)(_with(old.elem_type, dtype))
    return ir.TensorType(dtype)
