"""Every architecture in a process of its own with a time limit: a crash or a hang is an outcome, not the end."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from outcome import Outcome

ONE = "--one"
"""The option by which ``python tests/coverage`` calls itself: an architecture and the file for its outcome."""


def run_apart(name: str, limit: float, options: Sequence[str]) -> tuple[Outcome, float]:
    """Return the outcome of one architecture and how many seconds its process took; options go to the process."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fakequant-coverage-") as folder:
        record, log = Path(folder) / "outcome.json", Path(folder) / "log.txt"
        command = [sys.executable, str(Path(__file__).parent), ONE, name, str(record), *options]
        with log.open("w") as stream:
            try:
                code = subprocess.run(command, timeout=limit, stdout=stream, stderr=stream, check=False).returncode
                problem = f"the process ended with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after {limit:g} s"
        outcome = Outcome.read(record) if record.is_file() else Outcome()
        if problem:
            # The last stage written is the one that was running.
            stage = next(reversed(outcome.stages), "start")
            lines = log.read_text(errors="replace").strip().splitlines()
            outcome.stages[stage] = f"{problem}: {lines[-1]}" if lines else problem
    return outcome, time.perf_counter() - start
