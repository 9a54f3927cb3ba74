"""What placement decides: for each operand of each call, a quantizer or the reason for none."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

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
    def name(self) -> str:
        """Full name of the edge: ``layer1.0.add_0.other``."""
        return f"{self.call.name}.{self.operand_name}"

    @property
    def value(self) -> Value | None:
        """The value on the edge; None for SOFTMAX."""
        return None if self.operand == SOFTMAX else self.call.operand(self.operand)


SOFTMAX = -2


@dataclasses.dataclass(frozen=True)
class Override:
    """What a rule or the model itself says before the placement does.

    Args:
        quantized: whether there is a quantizer.
        reason: in words.
    """

    quantized: bool
    reason: str


Overrides: TypeAlias = Callable[[Call, bool], Override | None]
"""Of a call, and whether its weight is meant; None leaves it to the placement."""
