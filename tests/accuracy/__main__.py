"""``python tests/accuracy [name ...]``: what each number format costs a trained network, as a table for the docs.

Data of scikit-learn is cut in halves; each is tested by the network that was trained on the other. The sequences for
recurrent layers are made up. Seeds are fixed, and there is one thread, so that a machine gives its numbers again.
"""

import argparse
import dataclasses
import functools
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from formats import FORMATS
from measure import Outcome, measure
from sequence_tasks import INT8, accuracies
from torch import nn

import fakequant as fq


@dataclasses.dataclass(frozen=True)
class _Row:
    what: str
    bar: float
    run: Callable[[], Outcome]


def _of_sequences(layer: type[nn.RNNBase], recipe: fq.Recipe = INT8) -> Outcome:
    found = accuracies(layer, recipe)
    return Outcome(found.of_float, found.after_calibration, found.after_training, found.in_file)


_ROWS = {name: _Row(chosen.what, chosen.bar, functools.partial(measure, chosen)) for name, chosen in FORMATS.items()}
_ROWS["int8, LSTM"] = _Row("QAT", 0.5, functools.partial(_of_sequences, nn.LSTM))
_ROWS["int8 dynamic, LSTM"] = _Row("QAT", 0.5, functools.partial(_of_sequences, nn.LSTM, fq.preset("dynamic-lstm")))
_ROWS["int8, GRU"] = _Row("QAT", 0.5, functools.partial(_of_sequences, nn.GRU))


def main() -> int:
    """Print the table; return 1 if a format loses more than its bar."""
    options = _options()
    torch.set_num_threads(1)
    print("| format | | float | before training | quantized | lost | bar | in ONNX Runtime |")
    print(f"|{'---|' * 8}")
    found: dict[str, Outcome] = {}
    for name in options.names or _ROWS:
        found[name] = _ROWS[name].run()
        print(_line(name, found[name]), flush=True)
    if options.json:
        numbers = {name: dataclasses.asdict(outcome) | {"bar": _ROWS[name].bar} for name, outcome in found.items()}
        options.json.write_text(json.dumps(numbers))
    return int(any(outcome.lost > _ROWS[name].bar for name, outcome in found.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/accuracy", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(map(repr, _ROWS))}")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in _ROWS]:
        parser.error(f"expected names among {list(_ROWS)}, got {unknown}")
    return options


def _line(name: str, found: Outcome) -> str:
    untrained = "" if found.untrained is None else f"{found.untrained:.2f}"
    in_file = f"no file: {textwrap.shorten(found.refusal, 130)}" if found.in_file is None else f"{found.in_file:.2f}"
    lost = round(found.lost, 2) + 0.0  # no -0.00
    cells = [name, _ROWS[name].what, f"{found.float:.2f}", untrained, f"{found.quantized:.2f}", f"{lost:.2f}"]
    return f"| {' | '.join([*cells, f'{_ROWS[name].bar:g}', in_file])} |"


if __name__ == "__main__":
    sys.exit(main())
