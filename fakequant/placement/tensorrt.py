"""Where TensorRT wants quantizers: rules R30 to R44 of its explicit quantization.

Q/DQ on all inputs of weighted ops and on nothing between a convolution and its
activation; of a residual add, only on the branch that is not fused into a convolution;
everything else in float unless it is quantized on both sides.
"""

from fakequant.call_sites.ops import KIND_OF, Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value
from fakequant.placement.attention import find_attentions, why_too_long
from fakequant.placement.decision import SOFTMAX, Decision, Overrides
from fakequant.placement.decisions import Decisions
from fakequant.placement.fusion import distances, fused_convolution, only_readers
from fakequant.placement.layers import is_weighted, why_no_layer
from fakequant.placement.recurrent import decide_recurrent
from fakequant.placement.sizes import small_product, too_small
from fakequant.placement.squeeze_excite import Gate, find_gates


def place(graph: TensorGraph, overrides: Overrides) -> list[Decision]:
    """Return a decision for every operand of every call that quantization could be about, in order of execution."""
    return _Placement(graph, overrides).run()


class _Placement:
    def __init__(self, graph: TensorGraph, overrides: Overrides) -> None:
        self._graph = graph
        self._decisions = Decisions(overrides)

    def run(self) -> list[Decision]:
        gates = find_gates(self._graph)
        self._weighted({layer for gate in gates for layer in gate.layers})
        decide_recurrent(self._graph, self._decisions, small_product)
        for call in self._graph.calls:
            self._decisions.decide_custom(call)
        self._attention()
        self._residual_adds()
        # Averages and gates ask who reads their output, so those behind are decided first.
        by_call = {gate.product: gate for gate in gates}
        for call in reversed(self._graph.calls):
            if call.role is Role.AVERAGE:
                self._average(call)
            elif call in by_call:
                self._gate(by_call[call])
        self._rest()
        return self._decisions.in_order(self._graph)

    def _weighted(self, in_gates: set[Call]) -> None:
        for call in self._graph.calls:
            if is_weighted(call):
                self._weighted_call(call, in_gates)

    def _weighted_call(self, call: Call, in_gates: set[Call]) -> None:
        reason = why_no_layer(call)
        if not reason and call in in_gates:
            reason = "squeeze-and-excite gate: matrix-vector products on one pixel"
        if not reason and call.kind in {"conv1d", "conv_transpose1d"}:
            reason = "TensorRT reshapes its weight behind the DQ (R15); a Conv2d of height 1 can be quantized"
        reason = reason or too_small(call)
        self._decisions.decide(call, 0, not reason, reason or "input of a weighted layer (R30)")
        self._decisions.decide(call, 1, not reason, reason or "weight (R30)", is_weight=True)

    def _attention(self) -> None:
        for call in self._graph.calls:
            if call.role is Role.ATTENTION:
                mask = call.operand(3)
                if mask is not None and not mask.is_constant:
                    reason = "the mask depends on the input; no fused kernel (R42)"
                else:
                    reason = why_too_long(call.operand(0), call.operand(1), key_axis=-2)
                for operand in range(3):
                    self._decisions.decide(
                        call, operand, not reason, reason or "q, k, v of a fused attention (R42)", own_range=True
                    )
                self._decisions.decide(call, SOFTMAX, not reason, reason or "probabilities, at most 1 (R42)", amax=1.0)
        for found in find_attentions(self._graph):
            reason = found.why_not_fused()
            for product in (found.scores, found.result):
                for operand in (0, 1):
                    is_softmax = product is found.result and operand == 0
                    self._decisions.decide(
                        product,
                        operand,
                        not reason,
                        (reason and f"{reason} (R42)") or "product of a fused attention (R42)",
                        amax=1.0 if is_softmax else None,
                        own_range=True,
                    )

    def _residual_adds(self) -> None:
        for call in self._graph.calls:
            if call.kind != "add":
                continue
            operands = dict(self._graph.activations(call))
            if set(operands) != {0, 1}:
                continue
            self._residual_add(call, operands[0], operands[1])

    def _residual_add(self, call: Call, one: Value, other: Value) -> None:
        fused = [index for index, value in ((0, one), (1, other)) if self._is_fused(value)]
        if not fused:
            reason = "no operand comes straight out of a quantized convolution: float on both sides (R35)"
            self._decisions.decide(call, 0, False, reason)
            self._decisions.decide(call, 1, False, reason)
            return
        if one.shape != other.shape:
            for operand in (0, 1):
                self._decisions.decide(call, operand, False, "the operands are broadcast: no residual add")
            return
        kept = fused[0] if len(fused) == 1 else self._longer_branch(one, other)
        self._decisions.decide(call, kept, False, "fused into the convolution before it (R33)")
        self._decisions.decide(call, 1 - kept, True, "skip of a residual add (R33)")

    def _is_fused(self, value: Value) -> bool:
        convolution = fused_convolution(value)
        return convolution is not None and self._decisions.is_quantized(convolution)

    def _longer_branch(self, one: Value, other: Value) -> int:
        first, second = distances(self._graph, one), distances(self._graph, other)
        common = max(set(first) & set(second), key=lambda value: value.index, default=None)
        if common is None:
            return 0
        return 0 if first[common] >= second[common] else 1

    def _average(self, call: Call) -> None:
        value = call.operand(0)
        if value is None or not value.is_activation or len(value.shape) < 3:
            return
        if call.outputs[0].is_activation and only_readers(call.output, self._decisions.quantized):
            self._decisions.decide(call, 0, True, "average pooling whose output is quantized too (R35)")
        else:
            self._decisions.decide(call, 0, False, "average pooling whose output stays float (R35)")

    def _gate(self, gate: Gate) -> None:
        feature = gate.product.operand(gate.feature)
        assert feature is not None
        convolution = fused_convolution(feature, readers=2)
        self._decisions.decide(gate.product, 1 - gate.feature, False, "gate of squeeze-and-excite")
        if convolution is None or not self._decisions.is_quantized(convolution):
            reason = "the feature does not come straight out of a quantized convolution (R35)"
        elif not only_readers(gate.product.output, self._decisions.quantized):
            reason = "the gated feature stays float (R35)"
        else:
            self._decisions.decide(gate.product, gate.feature, True, "feature of squeeze-and-excite (R35)")
            return
        self._decisions.decide(gate.product, gate.feature, False, reason)

    def _rest(self) -> None:
        sites = set(KIND_OF.values())
        for call in self._graph.calls:
            if call.is_module or call.kind in sites:
                for operand, _ in self._graph.activations(call):
                    self._decisions.decide(call, operand, False, _WHY_FLOAT.get(call.role, "no integer kernel"))


_WHY_FLOAT = {
    Role.ADD: "no residual add of two activations",
    Role.MULTIPLY: "pointwise, fused in float (R40)",
    Role.POINTWISE: "fused into what is before it, or float (R31, R40)",
    Role.PRODUCT: "a product outside of a fused attention (R42)",
    Role.SOFTMAX: "stays float inside (R41)",
    Role.MOVE: "only moves elements: what is before and behind it shares one range",
}
