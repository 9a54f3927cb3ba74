"""Where ONNX Runtime wants quantizers on an x86 CPU: wherever it has an integer kernel, on both of its sides.

Its fusions need a Q right behind each convolution (and the ReLU that it absorbs), on both
operands and the output of an addition, multiplication or concatenation, and around
poolings; a linear layer needs only its inputs quantized. What has no integer kernel reads
dequantized values. Measured for ONNX Runtime 1.31.
"""

from fakequant.call_sites.ops import KIND_OF, RECURRENT_ROLES, Role
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value, sole_use
from fakequant.placement.decision import Decision, Overrides
from fakequant.placement.decisions import Decisions
from fakequant.placement.fusion import is_convolution
from fakequant.placement.groups import preserves_scale
from fakequant.placement.layers import is_weighted, why_no_layer
from fakequant.placement.recurrent import decide_recurrent
from fakequant.placement.signs import cuts_negatives

_LEAST_OF_A_CELL = 2**16
"""Elements of a weight. 128 x 512: 1.0 to 1.3 times the speed in floats, 512 x 2048: 1.5 to 2.4, 64 x 256: 0.85."""


def place(graph: TensorGraph, overrides: Overrides) -> list[Decision]:
    """Return a decision for every operand of every call that quantization could be about, in order of execution."""
    return _Placement(graph, overrides).run()


class _Placement:
    def __init__(self, graph: TensorGraph, overrides: Overrides) -> None:
        self._graph = graph
        self._overrides = overrides
        self._decisions = Decisions(overrides)
        self._float: dict[str, str] = {}
        """Layers that stay float -> why; one that is called several times does so for all of its calls."""
        self._sites = set(KIND_OF.values())
        self._carried: set[Value] = set()

    def run(self) -> list[Decision]:
        self._layers()
        for call in self._graph.calls:
            self._spread(call)
        for call in self._graph.calls:
            self._edges(call)
        return self._decisions.in_order(self._graph)

    # Layers.

    def _layers(self) -> None:
        """Decide about layers until no other call of one, or layer behind it, changes that."""
        known = -1
        while known < len(self._float):
            known = len(self._float)
            self._decisions = Decisions(self._overrides)
            decide_recurrent(self._graph, self._decisions, _slow_product)
            # From the back: whether a convolution can be followed by a Q depends on who reads it.
            for call in reversed(self._graph.calls):
                self._layer(call)

    def _layer(self, call: Call) -> None:
        self._decisions.decide_custom(call)
        if not is_weighted(call):
            return
        reason = self._float.get(call.name) or why_no_layer(call) or self._why_no_kernel(call)
        self._decisions.decide(call, 0, not reason, reason or "input of a weighted layer")
        self._decisions.decide(call, 1, not reason, reason or "weight", is_weight=True)
        if reason:
            self._float.setdefault(call.name, reason)

    def _why_no_kernel(self, call: Call) -> str:
        if call.kind.startswith("conv_transpose"):
            return "transposed convolutions have no integer kernel"
        if is_convolution(call) and not self._can_be_carried(_end(call)):
            return "its output leaves the model or is read without a quantizer; integer kernels want one there"
        return ""

    # Which values carry a quantizer.

    def _takes_quantizer(self, call: Call) -> bool:
        """Whether a quantizer can stand on an operand of a call."""
        if (call.role is Role.WEIGHTED and call.is_module) or call.role in RECURRENT_ROLES:
            return self._decisions.is_quantized(call)
        return call.is_module or call.kind in self._sites

    def _can_be_carried(self, value: Value) -> bool:
        """Whether every reader can read the value quantized."""
        if value.is_output or not value.uses:
            return False
        for call, operand in value.uses:
            if operand >= 0 and self._takes_quantizer(call):
                continue
            if preserves_scale(call) and all(self._can_be_carried(output) for output in call.outputs if output.uses):
                continue
            return False
        return True

    def _spread(self, call: Call) -> None:
        """Let values behind quantized ones be quantized too where there is an integer kernel between."""
        operands = dict(self._graph.activations(call))
        if is_convolution(call) and self._decisions.is_quantized(call):
            self._carried.add(_end(call))
        reached = any(value in self._carried for value in operands.values())
        if not reached:
            return
        if call.role in (Role.ADD, Role.MULTIPLY) and call.kind in ("add", "mul"):
            if len(operands) == 2 and self._can_be_carried(_absorbing(call.output)):
                self._carried.update((*operands.values(), _absorbing(call.output)))
        elif call.kind in ("cat", "stack"):
            # A constant operand, such as a class token, has no codes to go with those of the others.
            if len(operands) == len(call.operands) and self._can_be_carried(call.output):
                self._carried.update((*operands.values(), call.output))
        elif call.role is Role.AVERAGE:
            if len(operands[0].shape) == 4 and self._can_be_carried(call.output):
                self._carried.add(call.output)
        elif preserves_scale(call):
            self._carried.update(call.outputs)

    def _edges(self, call: Call) -> None:
        if not call.is_module and call.kind not in self._sites:
            return
        for operand, value in self._graph.activations(call):
            if value not in self._carried:
                self._decisions.decide(call, operand, False, "reads no tensor that an integer kernel makes")
            elif not self._takes_quantizer(call):
                self._decisions.decide(call, operand, False, "a float layer")
            else:
                self._decisions.decide(call, operand, True, "reads a tensor that an integer kernel makes or takes")


def _slow_product(inputs: int, outputs: int) -> str:
    """Return why the product of a cell is no faster in integers, "" if it is: measured for batches of 1, 16 and 64."""
    if inputs * outputs >= _LEAST_OF_A_CELL:
        return ""
    return f"a weight of {inputs} x {outputs}: integer products of cells pay from {_LEAST_OF_A_CELL} elements on"


def _end(convolution: Call) -> Value:
    """Return what an engine makes of a convolution: its output behind the norm that is folded and the ReLU."""
    value = convolution.output
    reader = sole_use(value)
    if reader is not None and reader.kind == "batch_norm":
        value = reader.output
    return _absorbing(value)


def _absorbing(value: Value) -> Value:
    """Return the output of the ReLU behind a value, which a Q from 0 upwards makes needless; else the value."""
    reader = sole_use(value)
    return reader.output if reader is not None and cuts_negatives(reader) else value
