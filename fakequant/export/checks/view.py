"""A model as the checks read it: flat nodes, constants, and every Q and DQ with its parameters."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import produced_by

Array = NDArray[np.generic]

PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1})

_SHAPE_OPS = frozenset({"Shape", "Size"})
"""Their outputs do not depend on the data, only on its shape: as good as constants here."""


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear.

    Args:
        node: the node.
        data: its first input.
        codes: type of its integers (or small floats); None if the file does not say.
        scale: None if it is computed at run time.
        zero_point: None if it is absent or computed at run time.
    """

    node: ir.Node
    data: ir.Value
    codes: ir.DataType | None
    scale: Array | None
    zero_point: Array | None

    @property
    def is_quantize(self) -> bool:
        """Whether it is a Q, not a DQ."""
        return self.node.op_type == "QuantizeLinear"

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale holds for all of the data; TensorRT takes [1] like a scalar."""
        return self.scale is None or self.scale.size <= 1

    @property
    def is_blocked(self) -> bool:
        """Whether the scale has as many dimensions as the data, or tries to."""
        return self.scale is not None and self.scale.size > 1 and self.scale.ndim > 1

    @property
    def axis(self) -> int | None:
        """The channel axis as written; None if it is not."""
        return self.node.attributes.get_int("axis") if "axis" in self.node.attributes else None

    @property
    def zero_point_value(self) -> ir.Value | None:
        """The third input; None if the node has none."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def output_dtype(self) -> int:
        """The attribute of that name; 0 if it is not written."""
        return self.node.attributes.get_int("output_dtype", 0)

    @property
    def is_untyped(self) -> bool:
        """Whether it is a Q that makes uint8 only because nothing says otherwise (rule R6)."""
        return self.is_quantize and self.zero_point_value is None and self.output_dtype == 0

    def same_grid(self, other: "Quantizer") -> bool:
        """Whether both have the same codes, scale, zero point and axis."""
        if self.node.inputs[1:] == other.node.inputs[1:]:
            return self.codes == other.codes and self.axis == other.axis
        if self.scale is None or other.scale is None or self.codes != other.codes or self.axis != other.axis:
            return False
        zero, other_zero = (np.zeros(1) if q.zero_point is None else q.zero_point.ravel() for q in (self, other))
        return np.array_equal(self.scale, other.scale) and np.array_equal(zero, other_zero)


class View:
    """One model, read once for all checks.

    Args:
        model: not changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.all_nodes = tuple(model.graph.all_nodes())
        self._constants = _constants(self.all_nodes)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Yield the nodes of some standard ops, those of inner graphs included."""
        for node in self.all_nodes:
            if node.domain == "" and node.op_type in op_types:
                yield node

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is an initializer or is computed from nothing else."""
        return value is not None and (value.is_initializer() or value in self._constants)

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return a constant's array, also behind Cast and Identity; None if it is not constant or takes more work."""
        if value is None or not self.is_constant(value):
            return None
        node = value.producer()
        if node is None or node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(value)
            return None if tensor is None else tensor.numpy()
        if node.op_type == "Identity":
            return self.constant(node.inputs[0])
        source = self.constant(node.inputs[0]) if node.op_type == "Cast" else None
        return None if source is None else source.astype(ir.DataType(node.attributes["to"].as_int()).numpy())

    @functools.cached_property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Every Q and DQ."""
        return tuple(self._quantizers.values())

    @functools.cached_property
    def grids(self) -> tuple[Quantizer, ...]:
        """Every Q, and every DQ whose parameters are not those of the Q in front of it: one finding a pair."""
        return tuple(q for q in self.quantizers if not self._repeats_its_q(q))

    def quantizer(self, node: ir.Node) -> Quantizer:
        """Return what is known of a Q or DQ node."""
        return self._quantizers[node]

    def _repeats_its_q(self, quantizer: Quantizer) -> bool:
        before = produced_by(quantizer.data, "QuantizeLinear")
        return not quantizer.is_quantize and before is not None and quantizer.same_grid(self.quantizer(before))

    @functools.cached_property
    def _quantizers(self) -> dict[ir.Node, Quantizer]:
        return {node: self._read(node) for node in self.nodes(*PAIR) if node.inputs[0] is not None}

    def _read(self, node: ir.Node) -> Quantizer:
        data, scale, zero_point = (*node.inputs, None, None)[:3]
        assert data is not None
        codes = _type_of(zero_point)
        if node.op_type == "DequantizeLinear":
            codes = _type_of(data) or codes
        elif codes is None:
            # Without a zero point or output_dtype, ONNX means uint8.
            codes = ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
        return Quantizer(node, data, codes, self.constant(scale), self.constant(zero_point))


def _constants(nodes: tuple[ir.Node, ...]) -> set[ir.Value]:
    found: set[ir.Value] = set()
    for node in nodes:
        sources = [value for value in node.inputs if value is not None]
        if node.op_type in _SHAPE_OPS or all(value.is_initializer() or value in found for value in sources):
            found.update(node.outputs)
    return found


def _type_of(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype
