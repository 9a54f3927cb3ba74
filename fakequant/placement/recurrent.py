"""Recurrent layers, which stay float, and cells, which are two products."""

from collections.abc import Callable

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph
from fakequant.nn.modules.recurrent import RUNS_IN_FLOAT
from fakequant.placement.decisions import Decisions


def decide_recurrent(graph: TensorGraph, decisions: Decisions, why_no_product: Callable[[int, int], str]) -> None:
    """Decide about the operands of every recurrent layer and cell.

    Args:
        graph: of the example forward.
        decisions: that are made so far.
        why_no_product: returns why a product with a weight [inputs, outputs] gains nothing from integers, else "".
    """
    for call in graph.calls:
        if call.role is Role.RECURRENT:
            _decide(call, decisions, RUNS_IN_FLOAT)
        elif call.role is Role.CELL:
            _decide(call, decisions, _why_no_cell(call, why_no_product))


def _decide(call: Call, decisions: Decisions, why_float: str) -> None:
    assert call.op is not None
    for operand, name in enumerate(call.op.operands):
        is_weight = name in call.op.weights
        reason = why_float or ("weight" if is_weight else "input or hidden state of a recurrent cell")
        decisions.decide(call, operand, not why_float, reason, is_weight=is_weight)


def _why_no_cell(call: Call, why_no_product: Callable[[int, int], str]) -> str:
    assert call.op is not None
    named = zip(call.op.operands, call.operands, strict=True)
    weights = [value for name, value in named if name in call.op.weights and value is not None]
    return next((why for weight in weights if (why := why_no_product(weight.shape[1], weight.shape[0]))), "")
