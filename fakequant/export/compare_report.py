"""What a comparison found, layer by layer: a table, and the first layer that leaves the tolerance in words."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from fakequant.shortened import shortened

OUTPUT_SQNR_DB = 50.0
"""Tolerance of an output of the graph, which has no grid: rounding a full-range signal to 8 bits leaves
6.02 * 8 + 1.76 dB; what is closer than that is less than one quantizer more would do."""

_HEADER = ("", "#", "quantizer or output", "steps", "moved", "SQNR", "steps", "SQNR", "from", "computed in")
_GROUPS = ("given equal inputs", "accumulated")
_LEFT = frozenset({0, 2, 8, 9})
"""The columns of words."""

_NAMES_SHOWN = 3
_OTHER_PRECISION = 2.0**-8
"""A scale that is written in half or bfloat16 differs by less."""


@dataclasses.dataclass(frozen=True)
class ComparedLayer:
    """One call of an activation quantizer, or one output of the graph.

    "Given equal inputs" is what the file computes from the codes that torch has at the sources;
    "accumulated" is what it computes from the batch, with all that went wrong before.

    Args:
        name: full name of the quantizer, the first if the file has one for several, with its call if not the
            first; or name of the output.
        quantizers: full names of all quantizers that it stands for; none for an output.
        modules: full names of the torch modules that compute it from the sources, in order of execution; an op
            that belongs to none, such as one of the outermost forward, is there as ``(Add)``.
        sources: names of the layers and of the inputs of the graph that it is computed from.
        scale: the step of its grid in the file; None for an output.
        torch_scale: the same in the model.
        steps: largest error of a code, given equal inputs; None for an output, which has no grid.
        moved: share of the codes that differ at all, given equal inputs; None for an output.
        sqnr_db: signal to difference in dB, given equal inputs; inf if nothing differs.
        accumulated_steps: largest error of a code, accumulated.
        accumulated_sqnr_db: signal to difference in dB, accumulated.
    """

    name: str
    quantizers: tuple[str, ...]
    modules: tuple[str, ...]
    sources: tuple[str, ...]
    scale: float | None
    torch_scale: float | None
    steps: int | None
    moved: float | None
    sqnr_db: float
    accumulated_steps: int | None
    accumulated_sqnr_db: float

    def is_within(self, tolerance: int) -> bool:
        """Whether the error given equal inputs is tolerable: so many steps, or 50 dB for an output."""
        return self.sqnr_db >= OUTPUT_SQNR_DB if self.steps is None else self.steps <= tolerance

    def __str__(self) -> str:
        """Return the error, and what to look at, in one sentence."""
        error = f"{self.sqnr_db:.1f} dB" if self.steps is None else f"{_counted(self.steps, 'step')} off"
        where = f" in {', '.join(self.modules)}" if self.modules else ""
        sentence = f"{self.name}: {error}, computed{where} from {', '.join(self.sources) or 'constants'}"
        if self._has_another_scale():
            sentence += f"; its scale is {self.scale:.6g} in the file and {self.torch_scale:.6g} in the model"
        return sentence

    def _has_another_scale(self) -> bool:
        if self.scale is None or self.torch_scale is None:
            return False
        return abs(self.scale - self.torch_scale) > _OTHER_PRECISION * self.torch_scale


@dataclasses.dataclass(frozen=True)
class CompareReport:
    """One batch in torch and in a file, layer by layer.

    Args:
        path: the file.
        provider: where it ran.
        optimized: whether with graph optimizations.
        tolerance: in steps at a quantizer; outputs have 50 dB.
        layers: activation quantizers in order of execution, then the outputs of the graph.
        notes: what could not be compared, and why.
    """

    path: Path
    provider: str
    optimized: bool
    tolerance: int
    layers: tuple[ComparedLayer, ...]
    notes: tuple[str, ...]

    @property
    def divergences(self) -> tuple[ComparedLayer, ...]:
        """The layers that leave the tolerance given equal inputs."""
        return tuple(layer for layer in self.layers if not layer.is_within(self.tolerance))

    @property
    def first_divergence(self) -> ComparedLayer | None:
        """The first of them: what computes it is at fault, and nothing before it."""
        return next(iter(self.divergences), None)

    def __str__(self) -> str:
        """Return a line for each layer, those beyond the tolerance marked, then the verdict."""
        optimizations = "on" if self.optimized else "off"
        title = f"{self.path} on {self.provider}, optimizations {optimizations}, against torch:"
        return "\n".join([title, *_table(self), *self.notes, self._verdict()])

    def _verdict(self) -> str:
        tolerance = f"{_counted(self.tolerance, 'step')} at a quantizer, {OUTPUT_SQNR_DB:.0f} dB at an output"
        first, others = self.first_divergence, len(self.divergences) - 1
        if first is None:
            worst = min((layer.accumulated_sqnr_db for layer in self.layers if layer.steps is None), default=math.inf)
            end = "the outputs are equal" if worst == math.inf else f"the outputs are at {worst:.1f} dB"
            return f"Every layer is within the tolerance ({tolerance}) given equal inputs; accumulated, {end}."
        more = f" Marked ! as well: {others} more." if others else ""
        return f"First beyond the tolerance ({tolerance}): {first}.{more}"


def _table(report: CompareReport) -> list[str]:
    numbers = {layer.name: str(number) for number, layer in enumerate(report.layers, start=1)}
    cells = [_HEADER]
    for layer in report.layers:
        others = len(layer.quantizers) - 1
        cells.append(
            (
                "" if layer.is_within(report.tolerance) else "!",
                numbers[layer.name],
                layer.name + (f" (+{others})" if others > 0 else ""),
                _or_dash(layer.steps, "d"),
                _or_dash(layer.moved, ".3%"),
                f"{layer.sqnr_db:.1f}",
                _or_dash(layer.accumulated_steps, "d"),
                f"{layer.accumulated_sqnr_db:.1f}",
                " ".join(numbers.get(source, source) for source in layer.sources),
                shortened(layer.modules, _NAMES_SHOWN),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    equal, together = sum(widths[3:6]) + 4, sum(widths[6:8]) + 2
    groups = f"{'':{sum(widths[:3]) + 6}}{_GROUPS[0]:^{equal}}  {_GROUPS[1]:^{together}}"
    return [groups.rstrip(), *lines]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        f"{cell:<{width}}" if column in _LEFT else f"{cell:>{width}}"
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
