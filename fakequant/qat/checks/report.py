"""What was found out about a model that is about to be trained."""

import dataclasses
from collections.abc import Sequence

from fakequant.errors import TrainingError

_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Args:
        name: full name of the quantizer, module or parameter; "" for the model as a whole.
        text: what was expected, and what is there.
        advice: what to do.
        is_hint: it may be on purpose.
    """

    name: str
    text: str
    advice: str
    is_hint: bool = False

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.name or 'model'}: {self.text}. {self.advice}."


@dataclasses.dataclass(frozen=True)
class TensorError:
    """What quantization does to one tensor.

    Args:
        name: of the quantizer that gives it, or of the output.
        sqnr_db: signal to quantization noise in dB; inf where nothing differs.
    """

    name: str
    sqnr_db: float

    def __str__(self) -> str:
        """Return name and error."""
        return f"{self.name} {self.sqnr_db:.1f} dB"


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What ``check`` found.

    Args:
        findings: problems and hints.
        num_batches: how many batches ran; without any, there are no errors.
        outputs: how far the outputs of the quantized model are from those of the float model.
        quantizers: how far each quantizer's output is from its own input, the worst first.
    """

    findings: tuple[Finding, ...]
    num_batches: int = 0
    outputs: tuple[TensorError, ...] = ()
    quantizers: tuple[TensorError, ...] = ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What makes the training go wrong."""
        return tuple(finding for finding in self.findings if not finding.is_hint)

    @property
    def hints(self) -> tuple[Finding, ...]:
        """What may be on purpose."""
        return tuple(finding for finding in self.findings if finding.is_hint)

    def raise_for_problems(self) -> "CheckReport":
        """Return itself if there is no problem.

        Raises:
            TrainingError: there are some; names them all.
        """
        if self.problems:
            raise TrainingError("\n  ".join([f"{len(self.problems)} problems:", *map(str, self.problems)]))
        return self

    def __str__(self) -> str:
        """Return the errors, the problems and the hints, each on a line."""
        lines = []
        if self.num_batches:
            lines.append(f"against the float model, {self.num_batches} batches: {', '.join(map(str, self.outputs))}")
            lines += _listed("noisiest quantizers", self.quantizers[:_ROWS])
        lines += _listed("problems", self.problems) or ["no problem"]
        return "\n".join([*lines, *_listed("hints", self.hints)])


def _listed(title: str, items: Sequence[object]) -> list[str]:
    return [f"{title}:", *(f"  {item}" for item in items)] if items else []
