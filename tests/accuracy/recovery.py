"""``python tests/accuracy/recovery.py``: how much of what calibration loses comes back by training, and in which way.

A narrow network on digits with few bits. Seeds choose the initial weights, the order of the batches, and how the data
is cut in halves that test each other. All ways of training have the same number of steps, learning rate and start.
There is one thread. For int8 see examples/mobilenet_table.py.
"""

import argparse
import copy
import dataclasses
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import NarrowNet
from tasks import digits, halves
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fakequant as fq
from fakequant import qat
from fakequant.demo.quickstart import Split, accuracy

BATCH = 64
FEATURES = ("1", "3")
"""The residual blocks of the narrow network."""
DISTANCE = 0.3
"""Weight of the distance in the loss: with 3 bits, on seeds 3 to 5, the best of six ways to weigh it."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train on.

    Args:
        epochs: of training.
        lr: at its beginning, of weights and learned ranges.
        learned: ranges of weights and activations are learned by LSQ.
        distilled: the loss has the distance from the float network, of logits and features, besides.
    """

    epochs: int
    lr: float
    learned: bool = False
    distilled: bool = False


WAYS = {
    "fixed ranges": Way(20, 0.03),
    "learned ranges": Way(20, 0.03, learned=True),
    "learned ranges, distilled": Way(20, 0.03, learned=True, distilled=True),
}


def run(num_bits: int, seed: int) -> dict[str, float]:
    """Return accuracies in percent, {"float": ..., "PTQ": ..., way: ...}, each the mean of two networks."""
    found: dict[str, list[float]] = {}
    for training, test in halves(digits(), seed):
        torch.manual_seed(seed)
        network = NarrowNet()
        fit(network, training, Way(30, 0.1))
        found.setdefault("float", []).append(accuracy(network, test))
        plain = calibrated(network, num_bits, training, learned=False)
        found.setdefault("PTQ", []).append(accuracy(plain, test))
        for name, way in WAYS.items():
            model = calibrated(network, num_bits, training, way.learned)
            torch.manual_seed(seed)
            fit(model, training, way, network if way.distilled else None)
            found.setdefault(name, []).append(accuracy(model, test))
    return {name: statistics.fmean(scores) for name, scores in found.items()}


def fit(model: nn.Module, training: Split, way: Way, teacher: nn.Module | None = None) -> None:
    """Train a float or a calibrated model on images that are shifted by up to one pixel."""
    images, labels = training
    batches = len(labels) // BATCH
    tuning = qat.FineTuning(way.lr, way.epochs * batches)
    optimizer = torch.optim.SGD(qat.parameter_groups(model, way.lr, weight_decay=1e-4), momentum=0.9)
    scheduler = tuning.scheduler(optimizer)
    distillation = None if teacher is None else qat.Distillation(teacher, features=FEATURES)
    model.train()
    for step in range(tuning.steps):
        if step % batches == 0:
            order = torch.randperm(len(labels))[: batches * BATCH].split(BATCH)
        batch = order[step % batches]
        shifted = _shifted(images[batch])
        output, distance = (model(shifted), 0.0) if distillation is None else distillation(model, shifted)
        loss = F.cross_entropy(output, labels[batch], label_smoothing=0.1) + DISTANCE * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    update_bn(images.split(BATCH), model)  # running statistics lag behind the weights
    model.eval()


def _shifted(images: Tensor) -> Tensor:
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def calibrated(network: nn.Module, num_bits: int, training: Split, learned: bool) -> nn.Module:
    """Return a copy with so many bits in every layer, the first and the last one too, one range a tensor."""
    learn = "lsq" if learned else False
    weight = fq.QuantDescriptor(num_bits, narrow_range=True, learn_amax=learn)
    activation = fq.QuantDescriptor(num_bits, unsigned=True, learn_amax=learn)
    recipe = fq.Recipe(tuple(fq.Rule(type=name, input=activation, weight=weight) for name in ("Conv2d", "Linear")))
    model = copy.deepcopy(network)
    fq.quantize(model, recipe, example_inputs=training[0][:BATCH], target="onnxruntime")
    fq.calibrate(model, training[0].split(BATCH), "mse", weight_method="mse", progress=False)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python tests/accuracy/recovery.py", description=__doc__)
    parser.add_argument("bits", nargs="*", type=int, default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="a file to write the accuracies to, by bits and seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| bits | network | accuracy, mean (of each seed) | of what PTQ lost, back |")
    print(f"|{'---|' * 4}")
    found = {}
    for bits in options.bits:
        found[bits] = [run(bits, seed) for seed in options.seeds]
        _print_rows(bits, found[bits])
    if options.json:
        options.json.write_text(json.dumps(found))


def _print_rows(bits: int, found: list[dict[str, float]]) -> None:
    means = {row: statistics.fmean(scores[row] for scores in found) for row in found[0]}
    for row, mean in means.items():
        scores = [f"{of_seed[row]:.2f}" for of_seed in found]
        lost = means["float"] - means["PTQ"]
        back = "" if row in ("float", "PTQ") else f"{(mean - means['PTQ']) / lost * 100:.0f} %"
        print(f"| {bits} | {row} | {mean:.2f} ({', '.join(scores)}) | {back} |", flush=True)


if __name__ == "__main__":
    main()
