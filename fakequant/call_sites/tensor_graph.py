"""Which tensor goes where in one forward: values, the calls that make and read them."""

import dataclasses
from collections.abc import Iterator

import torch

from fakequant.call_sites.ops import Op, Role


@dataclasses.dataclass(eq=False)
class Value:
    """One version of one tensor.

    Args:
        index: its number in the forward, in order of appearance.
        shape: of the example.
        dtype: of the example.
        producer: the call that made it; None for inputs, parameters and what an unknown function made.
        parameter: full name of the parameter or buffer that it is.
        is_constant: computed from parameters, buffers and constants only.
        is_output: the model returns it.
        uses: who reads it: (call, operand), operand -1 where it is an argument that no quantizer is for.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    producer: "Call | None" = None
    parameter: str = ""
    is_constant: bool = False
    is_output: bool = False
    uses: "list[tuple[Call, int]]" = dataclasses.field(default_factory=list)

    @property
    def is_activation(self) -> bool:
        """Whether it is floating point and depends on the input."""
        return self.dtype.is_floating_point and not self.is_constant

    def __repr__(self) -> str:
        """Return number and shape."""
        return f"Value({self.index}, {self.shape})"


@dataclasses.dataclass(eq=False)
class Call:
    """One op of one forward, or one call of a module that has a quantized class.

    Args:
        module: full name of the module in whose forward it is; of the module itself for a module call.
        kind: the op's name (see ops), or the function's own where ops knows none.
        occurrence: the how-manieth call of this kind in this forward of the module, from 0.
        visit: the how-manieth forward of the module in the example, from 0.
        op: what placement knows of it, None for an unknown function.
        is_module: whether the call is the module's own forward.
        operands: the values it reads, None where an operand is no tensor.
        outputs: the values it makes.
        arguments: a few plain arguments that placement asks for.
    """

    module: str
    kind: str
    occurrence: int
    visit: int
    op: Op | None
    is_module: bool
    operands: tuple[Value | None, ...]
    outputs: tuple[Value, ...] = ()
    arguments: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def site(self) -> str:
        """Name within the module: ``add_0``."""
        return f"{self.kind}_{self.occurrence}"

    @property
    def name(self) -> str:
        """Full name: ``layer1.0.add_0``; a module call goes by the module's name."""
        if self.is_module:
            return self.module
        return f"{self.module}.{self.site}".lstrip(".")

    @property
    def role(self) -> Role:
        """What the op means for placement."""
        return self.op.role if self.op is not None else Role.OTHER

    def operand_name(self, index: int) -> str:
        """Return the name of an operand."""
        return self.op.operand_name(index) if self.op is not None else "input"

    def operand(self, index: int) -> Value | None:
        """Return an operand; None if it is no tensor or was not given."""
        return self.operands[index] if index < len(self.operands) else None

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]

    def __repr__(self) -> str:
        """Return the name."""
        return f"Call({self.name})"


@dataclasses.dataclass(frozen=True, eq=False)
class TensorGraph:
    """One example forward: calls in order, and which modules ran directly inside another's forward.

    Args:
        calls: in order of execution.
        callees: full name of a module -> names of the modules that were called in its own forward.
    """

    calls: tuple[Call, ...]
    callees: dict[str, frozenset[str]]

    def named(self, name: str) -> list[Call]:
        """Return the calls of a full name, one a visit."""
        return [call for call in self.calls if call.name == name]

    def activations(self, call: Call) -> Iterator[tuple[int, Value]]:
        """Yield (operand, value) for every operand that is an activation."""
        for index, value in enumerate(call.operands):
            if value is not None and value.is_activation:
                yield index, value


def sole_use(value: Value) -> Call | None:
    """Return the call that reads a value if it is the only reader and the value is no output of the model."""
    if value.is_output or len(value.uses) != 1:
        return None
    return value.uses[0][0]
