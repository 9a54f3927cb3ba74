"""``python tests/support``: runs every quantized class and writes docs/layers.md; ``--check`` compares instead."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from checks import TARGETS, fast_cells, file_cell

from fakequant.nn import registered

_OUTPUT = Path(__file__).parents[2] / "docs" / "layers.md"
_COLUMNS = ("layer", "by default", "static", "dynamic", "QAT", *TARGETS)
_HEAD = """\
# Layers

What each quantized class does, made by `python tests/support`, which quantizes, calibrates, trains, exports and
inspects every one of them; for a file, between a quantized input and a quantized output.
`python tests/support --check` tells which rows are no longer true; `tests/test_support.py` does so for a part.

- **by default**: `quantize` quantizes it with a preset; otherwise the rule that asks for it. With an example,
  placement may leave a layer float where its target gains nothing, and says why.
- **static**: ranges from calibration; **dynamic**: `QuantDescriptor(8, dynamic=True)`; **QAT**: one step of SGD.
- **tensorrt**: what the file for TensorRT offers: *integer* has Q/DQ on all inputs of the product, *float* Q/DQ
  on the input only; in brackets what `check_onnx` has against it. No TensorRT ran for this table.
- **onnxruntime**: what ONNX Runtime CPU runs: an *integer* kernel, or *float*.
- Files have the default opset of their target; AdaptiveAvgPool3d and RReLU are exported at opset 17. Adaptive pools
  are exported for sizes that their output divides.
- Each file is within one step of torch at every quantizer, given equal inputs.

Embeddings and bilinear layers stay float by default: nothing is multiplied by a table, which in 8 bits is four
times smaller for ONNX Runtime and stays float for TensorRT; no runtime has an integer kernel for a bilinear layer.
Norms and activations are fused into the layer before them, which a quantizer between the two prevents.
"""


def main() -> int:
    """Write the table, or return 1 if it is not what the file says."""
    options = _options()
    warnings.simplefilter("ignore")
    expected = _OUTPUT.read_text(encoding="utf-8").splitlines() if options.check else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for float_class, _ in registered():
            if options.names and float_class.__name__ not in options.names:
                continue
            cells = [float_class.__name__, *fast_cells(float_class)]
            if not options.without_files:
                cells += [file_cell(float_class, target, Path(folder)) for target in TARGETS]
            rows.append(_line(cells))
            print(rows[-1], flush=True)
    if options.check:
        written = [line for line in expected if line.startswith("| ")][2:]
        return _compare(rows, [line for line in written if not options.names or _name(line) in options.names])
    if not options.without_files and not options.names:
        table = [_line(list(_COLUMNS)), _line(["---"] * len(_COLUMNS)), *sorted(rows, key=str.lower)]
        _OUTPUT.write_text("\n".join([_HEAD, *table]) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/support", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="these layers only; without --check, write nothing")
    parser.add_argument("--check", action="store_true", help="compare with docs/layers.md; write nothing")
    parser.add_argument("--without-files", action="store_true", help="leave out what needs an export")
    return parser.parse_args()


def _compare(found: list[str], written: list[str]) -> int:
    problems = list(_problems(found, written))
    print("\n".join(problems), file=sys.stderr)
    return int(bool(problems))


def _problems(found: list[str], written: list[str]) -> Iterator[str]:
    """Yield the rows that differ, as far as they were found, and those of classes that are not registered."""
    by_name = {_name(line): line for line in written}
    for row in found:
        line = by_name.pop(_name(row), "")
        if not line.startswith(row.removesuffix(" |")):
            yield f"found:   {row}\nwritten: {line or 'nothing'}"
    yield from (f"not registered: {line}" for line in by_name.values())


def _name(line: str) -> str:
    return line.split(" | ", maxsplit=1)[0].removeprefix("| ")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
