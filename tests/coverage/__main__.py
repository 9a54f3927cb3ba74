"""``python tests/coverage [name ...]``: many architectures through the whole pipeline; writes docs/coverage.md."""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from outcome import Outcome
from pipeline import TARGETS, Pipeline
from registry import ARCHITECTURES
from subprocesses import ONE, run_apart
from table import table

_OUTPUT = Path(__file__).parents[2] / "docs" / "coverage.md"


def main() -> int:
    """Run what is named, or everything; return 1 if anything has a fault."""
    options = _options()
    if options.one:
        name, record = options.one
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory(dir=Path(record).parent) as folder:
            Pipeline(ARCHITECTURES[name], Path(folder), Path(record), options.targets).run()
        return 0
    names = options.names or list(ARCHITECTURES)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        inherited = ["--threads", str(threads), "--targets", *options.targets]
        runs = pool.map(lambda name: run_apart(name, options.limit, inherited), names)
        for name, (outcome, seconds) in zip(names, runs, strict=True):
            results.append((ARCHITECTURES[name], outcome, seconds))
            print(f"{name:<36} {seconds:4.0f} s  {outcome.error or _summary(outcome)}", flush=True)
    text = table(results)
    if options.names:
        print(f"\n{text}")
    else:
        options.output.write_text(text, encoding="utf-8")
        print(f"\nwritten: {options.output}")
    return int(any(outcome.error for _, outcome, _ in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/coverage", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="print the table of these only; write nothing")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="the file to write (default: docs/coverage.md)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one architecture (default: 300)")
    parser.add_argument("--jobs", type=int, default=1, help="how many architectures at a time (default: 1)")
    parser.add_argument(
        "--targets", nargs="+", default=TARGETS, help=f"what to export to (default: {' '.join(TARGETS)})"
    )
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument(ONE, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{entry.name:<36} {entry.family}" for entry in ARCHITECTURES.values()))
        parser.exit()
    if unknown := [name for name in options.names if name not in ARCHITECTURES]:
        parser.error(f"expected names from --list, got {', '.join(unknown)}")
    return options


def _summary(outcome: Outcome) -> str:
    steps = ", ".join(f"{target} {steps} steps" for target, steps in outcome.steps.items())
    return f"{outcome.quantized} of {outcome.layers} layers, {steps}"


if __name__ == "__main__":
    sys.exit(main())
