"""check_onnx: is a file ready for its target? Read, not run; files of any origin."""

import dataclasses
import os
from pathlib import Path

from fakequant.export.checks import Finding, Severity, View, checks_for
from fakequant.export.load import load_model


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a target will not take, or not run as fast as it could.

    Args:
        path: the file.
        target: for which runtime.
        findings: errors first, then warnings.
        notes: worth knowing, and maybe on purpose.
    """

    path: Path
    target: str
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that the target refuses or computes wrongly."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that cost speed."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.WARNING)

    def __str__(self) -> str:
        """Return one line a finding, and a summary."""
        counts = [
            f"{len(found)} {word}{'' if len(found) == 1 else 's'}"
            for word, found in (("error", self.errors), ("warning", self.warnings), ("note", self.notes))
        ]
        lines = [f"  {finding}" for finding in (*self.findings, *self.notes)]
        return "\n".join([*lines, f"{self.path} for {self.target}: {', '.join(counts)}"])


def check_onnx(path: str | os.PathLike[str], target: str = "tensorrt") -> CheckReport:
    """Check a Q/DQ file against the documented rules of a target, without running it or the target.

    A rule that the file does not decide (dynamic shapes) is silent.

    Args:
        path: of the file, from ``export_onnx`` or any other tool.
        target: ``"tensorrt"``, ``"tensorrt-ep"`` or ``"onnxruntime-cuda"``.

    Returns:
        All findings, each with its rule, its node, what is wrong and what to do.

    Raises:
        InvalidValueError: unknown target.
        ValidationError: the file cannot be read.
    """
    checks = checks_for(target)
    view = View(load_model(path))
    found = sorted((finding for check in checks for finding in check.run(view)), key=lambda finding: finding.severity)
    return CheckReport(
        path=Path(path),
        target=target,
        findings=tuple(finding for finding in found if finding.severity is not Severity.INFO),
        notes=tuple(finding for finding in found if finding.severity is Severity.INFO),
    )
