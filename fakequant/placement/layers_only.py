"""Quantizers on layers only, whatever is around them and whatever the target.

For ranges that each call brings along, and for weights alone: no code goes from one layer to
the next, so nothing is fused across them.
"""

from fakequant.call_sites import TensorGraph
from fakequant.placement.decision import Decision, Overrides
from fakequant.placement.decisions import Decisions
from fakequant.placement.layers import is_layer, why_no_layer
from fakequant.placement.recurrent import decide_recurrent


def place(graph: TensorGraph, overrides: Overrides) -> list[Decision]:
    """Return a decision for the input and the weight of every layer, in order of execution."""
    decisions = Decisions(overrides)
    decide_recurrent(graph, decisions, lambda inputs, outputs: "")
    for call in graph.calls:
        decisions.decide_custom(call)
        if is_layer(call):
            reason = why_no_layer(call)
            decisions.decide(call, 0, not reason, reason or "input of a layer")
            decisions.decide(call, 1, not reason, reason or "weight", is_weight=True)
    return decisions.in_order(graph)
