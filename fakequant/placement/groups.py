"""Scale-preserving groups: values that are moved, cut or joined copies of each other share one range.

An op that only moves elements commutes with quantization when its operands and outputs
have one scale (rules R36, R37); engines then run it on integers, or not at all.
"""

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value


class Groups:
    """Union-find over the values of a graph.

    Args:
        graph: of one example forward.
    """

    def __init__(self, graph: TensorGraph) -> None:
        self._parent: dict[Value, Value] = {}
        for call in graph.calls:
            if preserves_scale(call):
                values = [value for value in (*call.operands, *call.outputs) if value is not None]
                activations = [value for value in values if value.is_activation]
                for value in activations[1:]:
                    self._join(activations[0], value)

    def of(self, value: Value) -> Value:
        """Return the value that stands for the group."""
        root = value
        while root in self._parent:
            root = self._parent[root]
        while value is not root:
            self._parent[value], value = root, self._parent[value]
        return root

    def _join(self, one: Value, other: Value) -> None:
        first, second = sorted((self.of(one), self.of(other)), key=lambda value: value.index)
        if first is not second:
            self._parent[second] = first


def preserves_scale(call: Call) -> bool:
    """Whether a call only moves elements, so that its operands and outputs can share one range."""
    if call.role is Role.IDENTITY:
        return True
    if call.role is not Role.MOVE:
        return False
    if call.kind == "interpolate":
        return str(call.arguments.get("mode", "nearest")).startswith("nearest")
    if call.kind == "pad":
        is_constant = call.arguments.get("mode", "constant") == "constant"
        return not (is_constant and call.arguments.get("value"))
    return True
