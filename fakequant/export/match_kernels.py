"""Which node of the optimized graph runs which node of the file.

ONNX Runtime renames what it fuses, but always after the node or after the tensor that
was there before: ``conv1_token_2``, ``fused fc``, ``fc/MatMulAddFusion``, ``<output>_nchwc``.
So a copy of the file, whose nodes and tensors all begin with a number of their own, is
what it is given to optimize; the number is then found inside every name it makes up.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from fakequant.errors import ValidationError
from fakequant.export.kernels import KERNELS
from fakequant.export.quantized_edges import only_reader
from fakequant.export.runtime import OptimizedNode, Session

_NUMBER = re.compile(r"fakequant(\d+)/")
_KEEPS_TYPE = frozenset(
    {"Expand", "Flatten", "Gather", "MaxPool", "NhwcMaxPool", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"}
) | {"Unsqueeze"}


class OptimizedGraph:
    """What ONNX Runtime CPU makes of a model.

    Args:
        model: the nodes that are asked about. Left as it is.
        path: where it came from, for messages.

    Raises:
        ValidationError: ONNX Runtime cannot load it; names the file.
    """

    def __init__(self, model: ir.Model, path: Path) -> None:
        nodes, self._numbers = _optimize(model, path)
        self._by_number: dict[int, list[OptimizedNode]] = {}
        for node in nodes:
            self._by_number.setdefault(_number_of(node), []).append(node)
        self._producers = {output: node for node in nodes for output in node.outputs}

    def kernel_of(self, node: ir.Node) -> OptimizedNode | None:
        """Return the node that computes an op; None if it was folded into another or into a constant.

        A fused node can bear the name of the last op that is in it, so the ops that alone
        read the result are looked at too, up to the first that is found.
        """
        kernels = KERNELS[node.op_type]
        follower: ir.Node | None = node
        while follower is not None:
            found = self._by_number.get(self._numbers[follower], [])
            best = max(found, key=lambda candidate: kernels.rank(candidate.op_type), default=None)
            if best is not None and kernels.rank(best.op_type):
                return best
            if (best is not None and follower is not node) or len(follower.outputs) != 1:
                return None
            follower = only_reader(follower.outputs[0])
            if follower is not None and follower.op_type == node.op_type:
                return None  # what is found there is that one's own
        return None

    def is_integer(self, node: ir.Node) -> bool:
        """Whether an op runs as an integer kernel."""
        kernel = self.kernel_of(node)
        kernels = KERNELS[node.op_type]
        if kernel is None:
            return False
        return kernel.op_type in kernels.integer or (kernel.op_type in kernels.either and self._reads_integers(kernel))

    def _reads_integers(self, node: OptimizedNode) -> bool:
        producer = self._producers.get(node.inputs[0]) if node.inputs else None
        if producer is None:
            return False
        if producer.op_type in _KEEPS_TYPE:
            return self._reads_integers(producer)
        return producer.op_type == "QuantizeLinear" or producer.op_type.startswith("QLinear")


def _optimize(model: ir.Model, path: Path) -> tuple[tuple[OptimizedNode, ...], dict[ir.Node, int]]:
    """Return the nodes of the optimized graph, and the number of each node of the model."""
    numbers = {node: number for number, node in enumerate(model.graph.all_nodes(), 1)}
    with tempfile.TemporaryDirectory(prefix="fakequant-") as folder:
        file = Path(folder) / "numbered.onnx"
        with _numbered(numbers):
            ir.save(model, file, external_data="numbered.onnx.data")
        try:
            return Session(file, optimized=True).nodes, numbers
        except ValidationError as error:
            raise ValidationError(f"{path}: onnxruntime cannot load it: {error.__cause__}") from error


@contextlib.contextmanager
def _numbered(numbers: dict[ir.Node, int]) -> Iterator[None]:
    """Put the number of a node before its name and those of its outputs, for a while."""
    named: list[tuple[ir.Node | ir.Value, int]] = []
    for node, number in numbers.items():
        named += [(node, number), *((output, number) for output in node.outputs)]
    names = [thing.name for thing, _ in named]
    for thing, number in named:
        if thing.name or isinstance(thing, ir.Node):  # an output that is left out has no name
            thing.name = f"fakequant{number}/{thing.name or ''}"  # ONNX Runtime looks for parts of some names
    try:
        yield
    finally:
        for (thing, _), name in zip(named, names, strict=True):
            thing.name = name


def _number_of(node: OptimizedNode) -> int:
    """Return the number in a node's name, else the one in its output's, else 0."""
    for name in (node.name, *node.outputs):
        found = _NUMBER.search(name)
        if found:
            return int(found[1])
    return 0
