"""Handwritten digits, from training to a validated int8 ONNX file, on a CPU in half a minute.

    python examples/quickstart.py        (or: python -m fakequant demo)

The data is scikit-learn's digits (1797 real 8x8 images, shipped with the package).
Every number in the table is measured by this run.
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq


class Block(nn.Module):
    """Two convolutions with BatchNorm around a skip connection, [N, C, H, W] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + f(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class DigitNet(nn.Module):
    """A small residual network, [N, 1, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = Block(16)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block2 = Block(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.block2(self.down(self.block1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


Split = tuple[Tensor, Tensor]
Splits = tuple[Split, Split]
Batches = list[tuple[Tensor, Tensor]]


def load_digits() -> Splits:
    """Return (images [N, 1, 8, 8] in 0..1, labels) for training and for the test."""
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise fq.MissingDependencyError("scikit-learn", "examples") from error
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=0.3, random_state=0, stratify=labels.numpy()
    )
    return (images[train], labels[train]), (images[test], labels[test])


def train(model: nn.Module, data: Split, epochs: int, learning_rate: float) -> None:
    """Train with SGD, momentum and a one-cycle schedule; the same loop trains float and quantized models."""
    images, labels = data
    steps = epochs * (len(labels) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels))[: len(labels) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of right answers, in percent."""
    images, labels = data
    return float((model(images).argmax(1) == labels).float().mean() * 100)


class Row:
    """One line of the table."""

    def __init__(self, name: str, percent: float, file: Path | None = None, milliseconds: float | None = None) -> None:
        self.name, self.percent, self.milliseconds = name, percent, milliseconds
        self.kilobytes = None if file is None else file.stat().st_size / 1e3

    def __str__(self) -> str:
        size = "" if self.kilobytes is None else f"{self.kilobytes:.1f} kB"
        latency = "" if self.milliseconds is None else f"{self.milliseconds:.2f} ms"
        return f"{self.name:<44}{self.percent:>8.2f} %{size:>12}{latency:>12}"


def run_file(name: str, file: Path, data: Split) -> Row:
    """Measure a file in ONNX Runtime: accuracy on the whole test set, median latency of 64 images."""
    from fakequant.export import Session

    session = Session(file)
    images, labels = data
    (feed,) = session.inputs
    logits = session.run({feed: images.numpy()})[session.outputs[0]]
    percent = (torch.from_numpy(logits).argmax(1) == labels).float().mean().item() * 100
    times = []
    for _ in range(50):
        start = time.perf_counter()
        session.run({feed: images[:64].numpy()})
        times.append((time.perf_counter() - start) * 1e3)
    return Row(name, percent, file, sorted(times)[25])


def post_training(float_model: nn.Module, data: Batches, test: Split, rows: list[Row]) -> nn.Module:
    """Quantize to int8 and calibrate by four methods from one pass over the data."""
    model = copy.deepcopy(float_model)
    print(fq.quantize(model, "int8", example_inputs=data[0][0], target="onnxruntime"))
    calibration = fq.calibrate(model, data, method="entropy", progress=False)
    for method in ("max", "percentile", "mse", "entropy"):
        calibration.apply(method)
        rows.append(Row(f"int8 PTQ, {method}, torch", accuracy(model, test)))
    return model


def fine_tuned(
    float_model: nn.Module, bits: int, epochs: int, data: Batches, splits: Splits, rows: list[Row]
) -> nn.Module:
    """Quantize weights to a few bits, calibrate, and train on (QAT)."""
    training, test = splits
    weights = fq.QuantDescriptor(bits, axis=0, narrow_range=True)
    model = copy.deepcopy(float_model)
    recipe = fq.preset("int8") + fq.Rule(weight=weights)
    fq.quantize(model, recipe, example_inputs=data[0][0], target="onnxruntime")
    fq.calibrate(model, data, method="entropy", weight_method="mse", progress=False)
    rows.append(Row(f"{bits}-bit weights, PTQ, torch", accuracy(model, test)))
    fq.freeze_batchnorm(model)
    train(model, training, epochs=epochs, learning_rate=0.02)
    rows.append(Row(f"{bits}-bit weights, QAT {epochs} epochs, torch", accuracy(model, test)))
    return model


def exported(models: dict[str, nn.Module], folder: Path, splits: Splits, rows: list[Row]) -> None:
    """Write a file a model for each target, compare it with torch, and measure the one for ONNX Runtime."""
    training, test = splits
    batch = ({0: torch.export.Dim("batch")},)
    for name, model in models.items():
        for target in ("tensorrt", "onnxruntime"):
            file = folder / f"digits_{name.replace(' ', '_')}_{target}.onnx"
            print(fq.export_onnx(model, (training[0][:2],), file, target=target, dynamic_shapes=batch))
            print(fq.validate_onnx(file, model, [test]))
        rows.append(run_file(f"{name}, file in ONNX Runtime", file, test))


def main(output: str | None = None) -> list[Row]:
    """Run everything, print one table, and return its rows."""
    torch.manual_seed(0)
    start = time.perf_counter()
    splits = training, test = load_digits()
    data = list(zip(training[0][:512].split(64), training[1][:512].split(64), strict=True))

    print(f"training a float model on {len(training[1])} digits ...")
    float_model = DigitNet()
    train(float_model, training, epochs=30, learning_rate=0.1)
    rows = [Row("float, torch", accuracy(float_model, test))]
    models = {
        "float": float_model,
        "int8 PTQ": post_training(float_model, data, test, rows),
        "4-bit QAT": fine_tuned(float_model, 4, 5, data, splits, rows),
        "2-bit QAT": fine_tuned(float_model, 2, 15, data, splits, rows),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        exported(models, folder, splits, rows)

    print(f"\n{'':<44}{'accuracy':>10}{'file':>12}{'64 images':>12}")
    for row in rows:
        print(row)
    print(
        "\nQuantized, trained and measured for ONNX Runtime; the same models were exported for TensorRT, too.\n"
        f"{time.perf_counter() - start:.0f} s in all"
    )
    return rows


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
