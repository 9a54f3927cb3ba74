"""Quantizers on layers only, whatever is around them and whatever the target.

For ranges that each call brings along, and for weights alone: no code goes from one layer to
the next, so nothing is fused across them.
"""

from fakequant.call_sites import TensorGraph
from fakequant.placement.decision import Decision, Overrides
from fakequant.placement.decisions import Decisions
from fakequant.placement.layers import is_weighted, why_no_layer
from fakequant.placement.recurrent import decide_recurrent
from fakequant.placement.sizes import groups_of

_GROUPED = "a convolution in groups has no integer kernel for ranges of a call"


def place(graph: TensorGraph, overrides: Overrides) -> list[Decision]:
    """Return a decision for the input and the weight of every layer, in order of execution."""
    decisions = Decisions(overrides)
    decide_recurrent(graph, decisions, lambda inputs, outputs: "")
    for call in graph.calls:
        decisions.decide_custom(call)
        if is_weighted(call):
            reason = why_no_layer(call) or (_GROUPED if groups_of(call) > 1 else "")
            decisions.decide(call, 0, not reason, reason or "input of a layer")
            decisions.decide(call, 1, not reason, reason or "weight", is_weight=True)
    return decisions.in_order(graph)
