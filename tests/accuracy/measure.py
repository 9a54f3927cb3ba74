"""Quantize, train, count right answers, export, and ask ONNX Runtime."""

import contextlib
import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from formats import Format
from torch import nn

import fakequant as fq
from fakequant.demo.quickstart import Split, Splits, accuracy, train
from fakequant.export import Session


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a format gave: accuracies in percent, the mean over all splits.

    Args:
        float: of the float networks.
        untrained: of the quantized ones before they were trained; None if they were not.
        quantized: of the quantized ones.
        in_file: of their files in ONNX Runtime; None if there are none.
        refusal: why.
    """

    float: float
    untrained: float | None
    quantized: float
    in_file: float | None
    refusal: str = ""

    @property
    def lost(self) -> float:
        """Points that quantization lost."""
        return self.float - self.quantized


def measure(chosen: Format) -> Outcome:
    """Quantize, train and export the network of each split."""
    splits, networks = chosen.task.splits(), chosen.task.trained()
    models = [calibrated(chosen, network, training) for network, (training, _) in zip(networks, splits, strict=True)]
    untrained = _mean(accuracy, models, splits) if chosen.epochs else None
    for model, (training, _) in zip(models, splits, strict=True):
        fine_tune(chosen, model, training)
    before, after = _mean(accuracy, networks, splits), _mean(accuracy, models, splits)
    try:
        return Outcome(before, untrained, after, _mean(_accuracy_in_file, models, splits))
    except fq.ExportError as error:
        return Outcome(before, untrained, after, None, str(error))


def calibrated(chosen: Format, network: nn.Module, training: Split) -> nn.Module:
    """Return a quantized copy."""
    model = copy.deepcopy(network)
    fq.quantize(model, chosen.recipe)
    if chosen.method is not None:
        batches = training[0].split(64)
        fq.calibrate(model, batches, chosen.method, weight_method=chosen.weight_method, progress=False)
    return model


def fine_tune(chosen: Format, model: nn.Module, training: Split) -> None:
    """Train on, if the format wants it."""
    if not chosen.epochs:
        return
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if chosen.gradient_bits is not None:
            stack.callback(fq.quantize_gradients(model, chosen.gradient_bits).remove)
        train(model, training, chosen.epochs, chosen.learning_rate)


def _mean(score: Callable[[nn.Module, Split], float], models: list[nn.Module], splits: list[Splits]) -> float:
    return statistics.fmean(score(model, test) for model, (_, test) in zip(models, splits, strict=True))


def _accuracy_in_file(model: nn.Module, test: Split) -> float:
    inputs, labels = test
    batch = ({0: torch.export.Dim("batch")},)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        fq.export_onnx(model, (inputs[:2],), file, target="onnxruntime", dynamic_shapes=batch)
        session = Session(file)
        (feed,) = session.inputs
        logits = session.run({feed: inputs.numpy()})[session.outputs[0]]
    return float((logits.argmax(1) == labels.numpy()).mean() * 100)
