"""Files for ONNX Runtime CPU against its own quantize_static, its float kernels and eager torch; the time of export.

``--quick`` measures batch 1 only; names after that pick networks.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from networks import network
from onnxruntime.quantization import (  # noqa: TID251 - what fakequant is compared with
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
    shape_inference,
)
from timing import print_ratios
from torch import nn

import fakequant as fq
from fakequant.export import Session

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "encoder", "vit_b_16")
_THREADS = 2


class _Batch(CalibrationDataReader):
    """One batch of calibration data, for quantize_static."""

    def __init__(self, name: str, batch: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{name: batch}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def model_and_input(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with random weights and settled statistics, and a batch for it."""
    if name == "encoder":
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, activation="gelu")
        return nn.TransformerEncoder(layer, 6).eval(), torch.randn(batch, 128, 384)
    model = network(name).train()
    if name == "vit_b_16":
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # zeros, from torchvision
    else:
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(8, 3, 96, 96))
    return model.eval(), torch.randn(batch, 3, 224, 224)


def files(folder: Path, model: nn.Module, x: torch.Tensor) -> dict[str, Path]:
    """Export a model as it is, by quantize_static, and by fakequant; print what the last two hold."""
    paths = {name: folder / f"{name}.onnx" for name in ("fakequant", "quantize_static", "float")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), paths["float"], dynamo=True, verbose=False, external_data=False)
    prepared = folder / "prepared.onnx"
    shape_inference.quant_pre_process(paths["float"], prepared, skip_symbolic_shape=True)
    (name,) = Session(paths["float"]).inputs
    quantize_static(
        prepared,
        paths["quantize_static"],
        _Batch(name, x.numpy()),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    fq.quantize(model, example_inputs=(x,), target="onnxruntime")
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), paths["fakequant"], target="onnxruntime")
    for kind in ("fakequant", "quantize_static"):
        print(f"\n{kind}: {fq.inspect_onnx(paths[kind])}")
    print(f"size: {paths['fakequant'].stat().st_size / paths['float'].stat().st_size:.3f} of the float file")
    return paths


def runs(path: Path, x: torch.Tensor) -> Callable[[], object]:
    """Return what runs a file on a batch."""
    session = Session(path, num_threads=_THREADS)
    feeds = {next(iter(session.inputs)): x.numpy()}
    return lambda: session.run(feeds)


def _eager(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def export_time() -> None:
    """Time the export of ResNet-50 against torch's own."""
    model, x = model_and_input("resnet50", 1)
    quantized, _ = model_and_input("resnet50", 1)
    fq.quantize(quantized, example_inputs=(x,))
    fq.calibrate(quantized, [x], progress=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_path, path = Path(folder) / "float.onnx", Path(folder) / "m.onnx"
        exports: dict[str, Callable[[], object]] = {
            "torch.onnx.export, float": lambda: torch.onnx.export(model, (x,), float_path, dynamo=True, verbose=False)
        }
        for target in ("tensorrt", "onnxruntime"):
            exports[f"export_onnx, {target}"] = lambda target=target: fq.export_onnx(
                quantized, (x,), path, target=target
            )
        print_ratios("export of ResNet-50", exports, rounds=5)


def main() -> None:
    """Measure what the arguments name."""
    onnxruntime.set_default_logger_severity(3)
    torch.set_num_threads(_THREADS)
    chosen = [name for name in sys.argv[1:] if name in NETWORKS] or NETWORKS
    for name in chosen:
        for batch in (1,) if "--quick" in sys.argv else (1, 4):
            model, x = model_and_input(name, batch)
            floats, _ = model_and_input(name, batch)
            with tempfile.TemporaryDirectory() as folder:
                paths = files(Path(folder), model, x)
                work = {kind: runs(path, x) for kind, path in paths.items()}
                work["eager torch"] = _eager(floats, x)
                print_ratios(f"{name}, batch {batch}", work, rounds=31, settle=0.05)
    if len(chosen) > 1:
        export_time()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s")
