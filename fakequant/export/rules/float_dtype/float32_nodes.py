"""Which nodes of a float16 or bfloat16 graph have to compute in float32, and why.

- Its op has no other type at this opset.
- The op leaves the range of float16 with everyday inputs (those that torch.autocast keeps in float32).
- A weight, bias or scale cannot be stored. What the layer computes then has such numbers
  too, so all float nodes up to the next Q, DQ or weighted layer are kept with it.
- It computes on integers, such as positions, of which float16 holds 2048 and bfloat16 256.
- Everything that it reads is float32 already: no Cast in between.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.checks.view import PAIR, View
from fakequant.export.graph import QUANTIZER_KEY, constant_of
from fakequant.export.kernels import WEIGHTED
from fakequant.export.rules.float_dtype.float_numbers import FloatNumbers
from fakequant.export.rules.float_dtype.op_types import OpTypes
from fakequant.export.rules.merge_quantizers import SEPARATOR

_AUTOCAST = frozenset(
    {
        *("CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
        *("ReduceProd", "ReduceSum", "ReduceSumSquare", "Softplus"),
    }
)
_SMALL_INTEGERS = frozenset(
    {ir.DataType.BOOL, ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.UINT8}
)
"""float16 and bfloat16 hold all of their numbers."""


class Float32Nodes:
    """The nodes, inputs and outputs of a float32 graph that keep their type.

    Args:
        model: not changed.
        numbers: of the type that the rest gets.

    Attributes:
        nodes: {node: reason}; the reason is "" for what computes constants. Q and DQ whose scale keeps its type are
            among them.
        values: inputs and outputs of the graph.
    """

    def __init__(self, model: ir.Model, numbers: FloatNumbers) -> None:
        self.nodes: dict[ir.Node, str] = {}
        self.values: set[ir.Value] = set()
        self._numbers = numbers
        self._types = OpTypes(model.opset_imports)
        self._view = View(model)
        self._ends = frozenset((*model.graph.inputs, *model.graph.outputs))
        self._on_integers: set[ir.Node] = set()
        for node in self._view.all_nodes:
            self._look_at(node)
        for node in self._view.all_nodes:
            self._keep_with_what_it_reads(node)
        for node in reversed(self._view.all_nodes):
            self._keep_with_its_readers(node)

    def _look_at(self, node: ir.Node) -> None:
        """Keep a node for a reason of its own."""
        if node.op_type in PAIR and node.domain == "":
            self._look_at_scale(node)
        elif reason := self._of_type(node):
            self.nodes.setdefault(node, reason)
        elif self._is_cast_from_integers(node):
            self.nodes.setdefault(node, f"computed from integers, which {self._numbers} does not hold exactly")
            self._on_integers.add(node)
        elif reason := next(filter(None, map(self._numbers.problem_of_constant, _constants(node))), ""):
            self._keep_around(node, reason)

    def _look_at_scale(self, node: ir.Node) -> None:
        scale, codes = constant_of(node.inputs[1]), _codes(node).dtype
        if scale is None or codes is None or not (problem := self._numbers.problem_of_scale(scale, codes)):
            return
        names = node.metadata_props.get(QUANTIZER_KEY, "").replace(SEPARATOR, ", ")
        reason = f"{names}: {problem}" if names else problem
        self.nodes[node] = reason
        if node.op_type == "QuantizeLinear":
            self._keep_near(node.inputs[0], reason)
        elif self._view.is_constant(node.outputs[0]):
            for reader in node.outputs[0].consumers():
                self._keep_around(reader, reason)
        else:
            self._keep_near(node.outputs[0], reason)

    def _of_type(self, node: ir.Node) -> str:
        floats = [i for i, value in enumerate(node.inputs) if is_float32(value)]
        computes = bool(node.outputs) and is_float32(node.outputs[0])
        if not floats and not computes:
            return ""
        if node.op_type in _AUTOCAST and node.domain == "":
            return f"{node.op_type} computes in float32, as under torch.autocast"
        dtype = self._numbers.dtype
        # An input of a fixed type, such as the scales of Resize, says nothing of the node.
        takes = not floats or any(self._types.takes(node, i, dtype) for i in floats)
        gives = not computes or self._types.gives(node, 0, dtype)
        return "" if takes and gives else f"{node.op_type} has no {self._numbers} in this opset"

    def _is_cast_from_integers(self, node: ir.Node) -> bool:
        if node.op_type != "Cast" or not is_float32(node.outputs[0]) or node.inputs[0] is None:
            return False
        source = node.inputs[0].dtype
        return source is not None and source.is_integer() and source not in _SMALL_INTEGERS

    def _keep_around(self, node: ir.Node, reason: str) -> None:
        """Keep a node, and those around what it computes."""
        self.nodes.setdefault(node, reason)
        for output in node.outputs:
            self._keep_near(output, reason)

    def _keep_near(self, value: ir.Value | None, reason: str) -> None:
        """Keep all nodes that make or read a value, and so on up to Q, DQ and weighted layers."""
        waiting, seen = [value], set[ir.Value]()
        while waiting:
            near = waiting.pop()
            if near is None or near in seen or not is_float32(near) or near.is_initializer():
                continue
            seen.add(near)
            maker = near.producer()
            if near in self._ends:
                self.values.add(near)
            for node in (*((maker,) if maker else ()), *near.consumers()):
                if node.op_type in PAIR:
                    continue
                self.nodes.setdefault(node, reason)
                if node.op_type not in WEIGHTED:
                    waiting += [*node.inputs, *node.outputs]

    def _keep_with_what_it_reads(self, node: ir.Node) -> None:
        """Keep a node that reads float32 from kept nodes, and else only from DQ, which gives what is wanted."""
        read = [v for v in node.inputs if v is not None and is_float32(v) and not self._view.is_constant(v)]
        makers = [maker for v in read if (maker := v.producer()) is not None]
        kept = [maker for maker in makers if maker in self.nodes]
        if node in self.nodes or node.op_type in PAIR or not kept or len(makers) < len(read):
            return
        on_integers = all(maker in self._on_integers for maker in makers)
        if node.op_type in WEIGHTED and not on_integers:
            return
        fills_a_mask = any(np.abs(array).max(initial=0) > self._numbers.largest for array in _constants(node))
        if not fills_a_mask and all(maker in self.nodes or maker.op_type == "DequantizeLinear" for maker in makers):
            self.nodes[node] = "all that it reads is float32"
            if on_integers:
                self._on_integers.add(node)

    def _keep_with_its_readers(self, node: ir.Node) -> None:
        """Keep what computes a constant that only kept nodes read."""
        output = node.outputs[0] if node.outputs else None
        if output is None or node.op_type in PAIR or not self._view.is_constant(output) or not is_float32(output):
            return
        readers = output.consumers()
        if readers and not output.is_graph_output() and all(reader in self.nodes for reader in readers):
            self.nodes.setdefault(node, "")


def is_float32(value: ir.Value | None) -> bool:
    """Whether a value, or each of a sequence, is float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def _codes(node: ir.Node) -> ir.Value:
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    assert codes is not None
    return codes


def _constants(node: ir.Node) -> Iterator[NDArray[np.generic]]:
    """Yield the float32 constants that a node reads."""
    for value in node.inputs:
        array = constant_of(value) if is_float32(value) else None
        if array is not None:
            yield array
