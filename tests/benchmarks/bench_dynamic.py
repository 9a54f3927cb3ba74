"""Files that need no calibration, in ONNX Runtime CPU against float: dynamic ranges, and weights of 4 bits.

The bar: dynamic at least 2.0 times as fast as float on an encoder of six layers. ``--quick`` measures batch 1 only.
"""

import copy
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from bench_onnxruntime import model_and_input, runs
from timing import print_ratios
from torch import nn

import fakequant as fq

_THREADS = 2
_OF_PRODUCTS = ("dynamic", "dynamic-per-token", "int4")
_LSTMS = ((64, 16, 1), (256, 64, 1), (512, 64, 1), (512, 16, 8))
"""Features and hidden size, steps, batch."""


def _files(folder: Path, model: nn.Module, x: torch.Tensor, recipes: tuple[str, ...]) -> dict[str, Path]:
    """Export a model as it is and by each recipe, and print what the files hold."""
    paths = {name: folder / f"{name}.onnx" for name in ("float", *recipes)}
    fq.export_onnx(copy.deepcopy(model), (x,), paths["float"], target="onnxruntime")
    for recipe in recipes:
        quantized = copy.deepcopy(model)
        fq.quantize(quantized, recipe, example_inputs=(x,), target="onnxruntime")
        fq.export_onnx(quantized, (x,), paths[recipe], target="onnxruntime")
        found = fq.validate_onnx(paths[recipe], quantized, [x])
        size = paths[recipe].stat().st_size / paths["float"].stat().st_size
        print(f"{recipe}: {size:.3f} of the float file; optimized {found.optimized.sqnr_db:.0f} dB from torch")
    return paths


def _linear(features: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = (nn.Linear(features, features) for _ in range(2))
    return nn.Sequential(*layers), torch.randn(1, features)


def _lstm(features: int, steps: int, batch: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.LSTM(features, features), torch.randn(steps, batch, features)


def main() -> None:
    """Measure the encoder, two large layers on one vector, where reading the weights takes the time, and LSTMs."""
    onnxruntime.set_default_logger_severity(3)
    torch.set_num_threads(_THREADS)
    batches = (1,) if "--quick" in sys.argv else (1, 4)
    cases = {f"encoder, batch {batch}": model_and_input("encoder", batch) for batch in batches}
    cases["two linear layers of 4096, batch 1"] = _linear(4096)
    for title, (model, x) in cases.items():
        _measure(title, model, x, _OF_PRODUCTS)
    for features, steps, batch in _LSTMS:
        title = f"LSTM of {features}, {steps} steps, batch {batch}"
        _measure(title, *_lstm(features, steps, batch), ("dynamic-lstm",))


def _measure(title: str, model: nn.Module, x: torch.Tensor, recipes: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = {kind: runs(path, x) for kind, path in _files(Path(folder), model.eval(), x, recipes).items()}
        print_ratios(title, work, rounds=31, settle=0.05)


if __name__ == "__main__":
    main()
