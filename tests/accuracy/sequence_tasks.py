"""Sequences with known answers, learned by an LSTM and a GRU: what quantization costs them, also in a file.

Each step has a value in -1..1 and a mark; two steps of a sequence are marked. The answer is
whether the sum of the marked values is positive, so the network has to keep one value over
the steps between, and to ignore all others.
"""

import copy
import dataclasses
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import Session
from fakequant.nn.walk import named_quantizers

LENGTH, HIDDEN = 8, 16
INT8 = fq.preset("int8") + fq.Rule("layer")
Split = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Shares of right answers, in percent.

    Args:
        of_float: of the float network.
        after_calibration: of the quantized network.
        after_training: of the quantized network, trained on.
        in_file: of its file in ONNX Runtime.
    """

    of_float: float
    after_calibration: float
    after_training: float
    in_file: float


class Classifier(nn.Module):
    """A recurrent layer and a linear one on its last output, [N, T, 2] to [N, 2]."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(2, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x)[0][:, -1])


def marked_sums(count: int, generator: torch.Generator) -> Split:
    """Return sequences [count, LENGTH, 2] and their labels."""
    values = torch.rand(count, LENGTH, generator=generator) * 2 - 1
    places = torch.rand(count, LENGTH, generator=generator).topk(2).indices
    marks = torch.zeros(count, LENGTH).scatter_(1, places, 1.0)
    return torch.stack([values, marks], dim=2), ((values * marks).sum(dim=1) > 0).long()


def train(model: nn.Module, steps: int, learning_rate: float, generator: torch.Generator) -> None:
    """Train on new sequences in each step; the same loop trains float and quantized models."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        x, labels = marked_sums(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def accuracies(layer: type[nn.RNNBase], recipe: fq.Recipe = INT8) -> Accuracies:
    """Train a classifier with nn.LSTM or nn.GRU, quantize it, train on, export it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, test = Classifier(layer), marked_sums(4000, generator)
    train(model, 600, 0.02, generator)
    of_float = _right(model(test[0]), test)
    quantized = copy.deepcopy(model)
    fq.quantize(quantized, recipe)
    if any(quantizer.is_to_calibrate for _, quantizer in named_quantizers(quantized)):
        fq.calibrate(quantized, [marked_sums(256, generator)], progress=False)
    after_calibration = _right(quantized(test[0]), test)
    train(quantized, 100, 0.002, generator)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sequences.onnx"
        fq.export_onnx(quantized, (test[0],), path, target="onnxruntime")
        session = Session(path)
        (logits,) = session.run({name: test[0].numpy() for name in session.inputs}).values()
    return Accuracies(
        of_float, after_calibration, _right(quantized(test[0]), test), _right(torch.from_numpy(logits), test)
    )


def _right(logits: Tensor, test: Split) -> float:
    return float((logits.argmax(dim=1) == test[1]).float().mean() * 100)
