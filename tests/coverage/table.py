"""The table of outcomes as Markdown."""

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Sequence

from architecture import Architecture
from outcome import MISSING, OK, Outcome
from pipeline import TARGETS

_PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnxruntime")
_COLUMNS = (
    "architecture",
    "family",
    "layers quantized",
    "plan",
    "quantize",
    "calibrate",
    "train",
    "export tensorrt",
    "findings",
    "steps tensorrt",
    "export onnxruntime",
    "steps onnxruntime",
    "seconds",
)
_HEAD = """\
# Coverage

What becomes of {total} architectures on the whole way: {ok} of {total} are through it without a fault{missing}.

Made by `python tests/coverage` on {date} with Python {python}, {versions};
random weights, random data, one process an architecture.
Again for some of them: `python tests/coverage resnet18 yolov8n`, which prints and writes nothing.

- **layers quantized**: convolutions and linear layers with a quantizer, of all of them.
- **plan**, **quantize**, **calibrate** (max, 2 batches): for target `tensorrt`.
- **train**: one step of SGD in train mode; the loss is finite and no range of an activation moves.
- **export**: `export_onnx` for that target, after the training step.
- **findings**: what `check_onnx` has against the file for `tensorrt`.
- **steps**: the largest difference between the file in ONNX Runtime (optimizations off) and torch at any
  quantizer given equal inputs, in quantization steps; then SQNR of the outputs end to end. 1 is rounding at a boundary
  between two codes; more is a fault.
- **-** stands for what did not run.
"""


def table(results: Sequence[tuple[Architecture, Outcome, float]]) -> str:
    """Return the whole file: how it was made, one row an architecture, the faults in full."""
    faults = [(entry.name, outcome.error) for entry, outcome, _ in results if outcome.error]
    absent = sorted({stage for _, outcome, _ in results for stage in outcome.missing})
    head = _HEAD.format(
        total=len(results),
        ok=len(results) - len(faults),
        missing=f" (not in this fakequant: {', '.join(absent)})" if absent else "",
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        versions=", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES),
    )
    rows = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    rows += [_line(_cells(entry, outcome, seconds)) for entry, outcome, seconds in results]
    parts = [head, "\n".join(rows)]
    if faults:
        parts += ["\n## Faults\n", "\n".join(f"- **{name}**: {error}" for name, error in faults)]
    return "\n".join(parts) + "\n"


def _cells(entry: Architecture, outcome: Outcome, seconds: float) -> list[str]:
    first, second = TARGETS
    return [
        entry.name,
        entry.family,
        f"{outcome.quantized} of {outcome.layers}" if outcome.layers else MISSING,
        *(_cell(outcome, stage) for stage in ("plan", "quantize", "calibrate", "train", f"export {first}")),
        MISSING if outcome.findings is None else str(outcome.findings),
        _steps(outcome, first),
        _cell(outcome, f"export {second}"),
        _steps(outcome, second),
        f"{seconds:.0f}",
    ]


def _cell(outcome: Outcome, stage: str) -> str:
    result = outcome.stages.get(stage, MISSING)
    return result if result in {OK, MISSING} else "**fault**"


def _steps(outcome: Outcome, target: str) -> str:
    if target not in outcome.steps:
        return "**fault**" if outcome.stages.get(f"validate {target}", MISSING) not in {OK, MISSING} else MISSING
    steps, sqnr = outcome.steps[target], outcome.sqnr_db[target]
    return f"{'none' if steps is None else steps}; {'exact' if math.isinf(sqnr) and sqnr > 0 else f'{sqnr:.0f} dB'}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
