"""What became of one architecture; the record that a subprocess hands back."""

import dataclasses
import json
from pathlib import Path

OK = "ok"
MISSING = "-"
"""The cell of a stage that this fakequant does not have."""

STEPS_ALLOWED = 1
"""A value on the boundary of two codes may fall to either side in another runtime."""


@dataclasses.dataclass
class Outcome:
    """Results by stage, in the order in which the stages ran.

    Attributes:
        quantized: convolutions and linear layers with a quantizer.
        layers: convolutions and linear layers in all.
        stages: by name "ok", MISSING, or the first line of the error.
        findings: what the readiness check found in the file for TensorRT; None before it ran.
        steps: by target, the largest difference from torch in quantization steps.
        sqnr_db: by target, end to end without graph optimizations.
        seconds: by stage.
    """

    quantized: int = 0
    layers: int = 0
    stages: dict[str, str] = dataclasses.field(default_factory=dict)
    findings: int | None = None
    steps: dict[str, int | None] = dataclasses.field(default_factory=dict)
    sqnr_db: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> str:
        """The first stage that failed and how; empty if none did."""
        for stage, result in self.stages.items():
            if result not in {OK, MISSING}:
                return f"{stage}: {result}"
        if self.findings:
            return f"readiness: {self.findings} findings"
        for target, steps in self.steps.items():
            if steps is None:
                return f"validate {target}: no quantizer of the file could be compared"
            if steps > STEPS_ALLOWED:
                return f"validate {target}: {steps} steps"
        return ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The stages that this fakequant does not have."""
        return tuple(stage for stage, result in self.stages.items() if result == MISSING)

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Outcome":
        """Read it back."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))
