"""What computes a tensor of a cut graph: the torch modules on the way to it, and what they start from."""

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.cut_graph import quantizer_names
from fakequant.export.graph import MODULE_KEY

_SHAPES = frozenset({"Shape", "Size"})
"""Ops that read no numbers."""

_SILENT = frozenset({"Cast", "Constant", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
"""Ops that are no module's own."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The part of a cut graph between some of its inputs and one of its tensors.

    Args:
        modules: full names of the torch modules in it, in order of execution, quantizers left out. An op
            of the outermost forward, or of a file that does not say, is there as ``(Add)``.
        sources: names of the inputs of the graph that it starts from, in order of the graph.
    """

    modules: tuple[str, ...]
    sources: tuple[str, ...]


class Stretches:
    """Finds the stretches of one graph.

    Args:
        graph: cut; it must not change afterwards.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._quantizers = {name for node in graph.all_nodes() for name in quantizer_names(node)}

    def to(self, name: str) -> Stretch:
        """Return the stretch that ends in the output of this name."""
        (end,) = {value for value in self._graph.outputs if value.name == name}
        read, nodes, waiting = set[ir.Value](), set[ir.Node](), [end]
        while waiting:
            value = waiting.pop()
            producer = value.producer()
            read.add(value)
            if producer is None or producer in nodes or producer.op_type in _SHAPES:
                continue
            nodes.add(producer)
            waiting.extend(_read_by(producer))
        modules = (self._module(inner) for node in self._graph if node in nodes for inner in _with_inner(node))
        sources = (str(value.name) for value in self._graph.inputs if value in read and not value.is_initializer())
        return Stretch(tuple(dict.fromkeys(filter(None, modules))), tuple(sources))

    def _module(self, node: ir.Node) -> str:
        """Return what to call the place of a node; nothing for what is between the modules."""
        module = node.metadata_props.get(MODULE_KEY, "")
        if module in self._quantizers or node.op_type in _SILENT:
            return ""
        return module or f"({node.op_type})"


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """Yield a node and those of its branches and loop bodies."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    for inner in _with_inner(node):
        yield from (value for value in inner.inputs if value is not None)
