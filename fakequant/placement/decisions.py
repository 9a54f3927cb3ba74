"""The decisions of one placement while it makes them."""

from collections.abc import Iterator

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph
from fakequant.placement.decision import SOFTMAX, Decision, Overrides


class Decisions:
    """One decision an edge: the first counts, and what a rule says counts more.

    Args:
        overrides: what rules and the model say.
    """

    def __init__(self, overrides: Overrides) -> None:
        self._overrides = overrides
        self._by_edge: dict[tuple[Call, int], Decision] = {}

    def decide(
        self,
        call: Call,
        operand: int,
        quantized: bool,
        reason: str,
        *,
        is_weight: bool = False,
        amax: float | None = None,
        own_range: bool = False,
    ) -> None:
        """Decide about an edge, unless that was done before. The arguments are those of Decision."""
        override = self._overrides(call, is_weight)
        is_there = operand == SOFTMAX or call.operand(operand) is not None
        if override is not None and not override.quantized:
            quantized, reason = False, override.reason
        elif override is not None and is_there and not quantized:
            quantized, reason = True, override.reason
        self._by_edge.setdefault(
            (call, operand), Decision(call, operand, quantized, reason, is_weight, amax, own_range)
        )

    def decide_custom(self, call: Call) -> None:
        """Quantize what the registration of a custom op says."""
        if call.role is not Role.CUSTOM or call.op is None:
            return
        for operand, name in enumerate(call.op.operands):
            if call.operand(operand) is not None and name in (*call.op.quantized, *call.op.weights):
                self.decide(call, operand, True, "registered custom op (R48)", is_weight=name in call.op.weights)

    def is_quantized(self, call: Call, operand: int = 0) -> bool:
        """Whether it was decided that an edge carries a quantizer."""
        decision = self._by_edge.get((call, operand))
        return decision is not None and decision.quantized

    @property
    def quantized(self) -> set[tuple[Call, int]]:
        """The edges that carry a quantizer, as far as decided."""
        return {edge for edge, decision in self._by_edge.items() if decision.quantized}

    def in_order(self, graph: TensorGraph) -> list[Decision]:
        """Return all decisions in order of execution."""
        order = {call: index for index, call in enumerate(graph.calls)}
        return sorted(self, key=lambda decision: order[decision.call])

    def __iter__(self) -> Iterator[Decision]:
        """Iterate in the order in which they were made."""
        return iter(self._by_edge.values())
