"""A check: one rule, its severity, what to do about it, and a function that finds where it is broken."""

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import TypeAlias

import onnx_ir as ir

from fakequant.errors import InvalidValueError
from fakequant.export.checks.view import View
from fakequant.export.graph import MODULE_KEY

Fault: TypeAlias = tuple[ir.Node, str]
"""Where a rule is broken, and how, with the values that are there."""

Finder: TypeAlias = Callable[[View], Iterator[Fault]]


class Severity(enum.IntEnum):
    """How bad it is; the worst is the smallest, so that sorting puts it first."""

    ERROR = 0
    """The target refuses the file, or computes something else than it says."""
    WARNING = 1
    """The target takes the file, but runs a part of it in float or with extra kernels."""
    INFO = 2
    """Worth knowing; may be on purpose."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place where a file breaks a rule.

    Args:
        rule: its number, such as ``"R4"``.
        severity: error, warning or info.
        node: name of the node; of one without a name, its op and output.
        module: full name of the torch module it comes from, "" if the file does not say.
        problem: what is wrong, with the values that are there.
        advice: what to do.
    """

    rule: str
    severity: Severity
    node: str
    module: str
    problem: str
    advice: str

    def __str__(self) -> str:
        """Return one line."""
        place = f"{self.node} (module {self.module})" if self.module else self.node
        return f"{self.severity.name.lower()} {self.rule} {place}: {self.problem}. {self.advice}."


@dataclasses.dataclass(frozen=True)
class Check:
    """One registered check.

    Args:
        rule: the number of its rule.
        severity: of all its findings.
        advice: what to do about any of them, a sentence without its full stop.
        find: yields (node, problem) for each place where the rule is broken.
    """

    rule: str
    severity: Severity
    advice: str
    find: Finder

    @property
    def name(self) -> str:
        """Rule and function, such as ``"R4 bad_scales"``."""
        return f"{self.rule} {self.find.__name__}"

    def run(self, view: View) -> Iterator[Finding]:
        """Yield the findings on one model."""
        for node, problem in self.find(view):
            module = node.metadata_props.get(MODULE_KEY, "")
            yield Finding(self.rule, self.severity, described(node), module, problem, self.advice)


_CHECKS: dict[str, list[Check]] = {}
"""{target: its checks}."""


def check(
    rule: str, severity: Severity, advice: str, targets: tuple[str, ...] = ("tensorrt", "tensorrt-ep")
) -> Callable[[Finder], Check]:
    """Make a function the check of a rule, for each of the targets.

    The TensorRT provider of ONNX Runtime has TensorRT's rules; a node that breaks one of them is an
    error there too, though it may then run outside of TensorRT.
    """

    def register(find: Finder) -> Check:
        made = Check(rule, severity, advice, find)
        for target in targets:
            _CHECKS.setdefault(target, []).append(made)
        return made

    return register


def checks_for(target: str) -> tuple[Check, ...]:
    """Return the checks of a target.

    Raises:
        InvalidValueError: there are none for it; lists the targets that have some.
    """
    if target not in _CHECKS:
        raise InvalidValueError(f"target: expected one of {sorted(_CHECKS)}, got {target!r}")
    return tuple(_CHECKS[target])


def described(node: ir.Node) -> str:
    """Return the name of a node; of one without a name, its op and first output."""
    if node.name:
        return node.name
    outputs = [output.name for output in node.outputs if output.name]
    return f"{node.op_type} of {outputs[0]}" if outputs else node.op_type
