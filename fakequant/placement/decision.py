"""What placement decides: for each operand of each call, a quantizer or the reason for none."""

import dataclasses

from fakequant.call_sites.tensor_graph import Call, Value


@dataclasses.dataclass(frozen=True)
class Decision:
    """One edge of the tensor graph: a value on its way into a call.

    Args:
        call: that reads the value.
        operand: which of its operands; ``SOFTMAX`` for the probabilities inside a fused attention.
        quantized: whether the edge carries a quantizer.
        reason: the rule that decided, in words.
        is_weight: the value is a weight.
        amax: a range that is known without data, None for a calibrated one.
        own_range: the edge shares its range with other readers of the very same value only,
            not with the whole group of values that are moved copies of each other.
    """

    call: Call
    operand: int
    quantized: bool
    reason: str
    is_weight: bool = False
    amax: float | None = None
    own_range: bool = False

    @property
    def operand_name(self) -> str:
        """Name of the operand."""
        return "softmax" if self.operand == SOFTMAX else self.call.operand_name(self.operand)

    @property
    def value(self) -> Value | None:
        """The value on the edge; None for SOFTMAX."""
        return None if self.operand == SOFTMAX else self.call.operand(self.operand)


SOFTMAX = -2
