"""``python tests/accuracy/recovery.py``: how much of what calibration loses comes back by training, and in which way.

Every row is measured with several seeds, which choose the initial weights, the order of the batches and, for the
narrow network on digits, how the data is cut in halves that test each other. All ways of training have the same
number of steps, learning rate and start. Seeds are fixed, and there is one thread.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from networks import NarrowNet
from tasks import digits, halves
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fakequant as fq
from fakequant import qat
from fakequant.demo.quickstart import Split, Splits, accuracy, load_digits

BATCH, FLOAT_LR = 64, 0.1
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
        frozen: batch norms keep the statistics of the float network; else these are taken anew at the end.
    """

    epochs: float
    lr: float
    learned: bool = False
    distilled: bool = False
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A trained network that is quantized in one way, and trained on in several.

    Args:
        what: for the table.
        networks: seed -> float networks, trained, each with its training and its test data.
        recipe: whether ranges are learned -> the grids.
        method: of calibration, for weights too.
        ways: by name.
    """

    what: str
    networks: Callable[[int], Iterator[tuple[nn.Module, Splits]]]
    recipe: Callable[[bool], fq.Recipe]
    method: str
    ways: dict[str, Way]


def run(experiment: Experiment, seed: int) -> dict[str, float]:
    """Return accuracies in percent, {"float": ..., "PTQ": ..., way: ...}, each a mean over the networks of a seed."""
    found: dict[str, list[float]] = {}
    for network, (training, test) in experiment.networks(seed):
        found.setdefault("float", []).append(accuracy(network, test))
        plain = _calibrated(network, experiment, training, learned=False)
        found.setdefault("PTQ", []).append(accuracy(plain, test))
        for name, way in experiment.ways.items():
            model = _calibrated(network, experiment, training, way.learned)
            torch.manual_seed(seed)
            fit(model, training, way, network if way.distilled else None)
            found.setdefault(name, []).append(accuracy(model, test))
    return {name: statistics.fmean(scores) for name, scores in found.items()}


def fit(model: nn.Module, training: Split, way: Way, teacher: nn.Module | None = None) -> None:
    """Train a float or a calibrated model on images that are shifted by up to one pixel."""
    images, labels = training
    batches = len(labels) // BATCH
    tuning = qat.FineTuning(way.lr, max(1, round(way.epochs * batches)))
    optimizer = torch.optim.SGD(qat.parameter_groups(model, way.lr, weight_decay=1e-4), momentum=0.9)
    scheduler = tuning.scheduler(optimizer)
    distillation = None if teacher is None else qat.Distillation(teacher, features=FEATURES)
    model.train()
    if way.frozen:
        qat.freeze_batchnorm(model)
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
    if not way.frozen:  # running statistics lag behind the weights
        update_bn(images.split(BATCH), model)
    model.eval()


def _shifted(images: Tensor) -> Tensor:
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def _calibrated(network: nn.Module, experiment: Experiment, training: Split, learned: bool) -> nn.Module:
    model = copy.deepcopy(network)
    fq.quantize(model, experiment.recipe(learned), example_inputs=training[0][:BATCH], target="onnxruntime")
    method = experiment.method
    fq.calibrate(model, training[0].split(BATCH), method, weight_method=method, progress=False)
    return model


def _narrow(seed: int) -> Iterator[tuple[nn.Module, Splits]]:
    for training, test in halves(digits(), seed):
        torch.manual_seed(seed)
        network = NarrowNet()
        fit(network, training, Way(30, FLOAT_LR))
        yield network, (training, test)


def _unequal(seed: int) -> Iterator[tuple[nn.Module, Splits]]:
    example = _mobilenet_example()
    torch.manual_seed(seed)
    training, test = load_digits()
    network = example.MobileDigitNet()
    fit(network, training, Way(30, FLOAT_LR))
    example.move_ranges_apart(network, example.OCTAVES, torch.Generator().manual_seed(seed))
    yield network, (training, test)


def _mobilenet_example() -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "mobilenet_table.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _few_bits(num_bits: int) -> Callable[[bool], fq.Recipe]:
    """Return grids of so many bits for every layer, the first and the last one too, one range a tensor."""

    def recipe(learned: bool) -> fq.Recipe:
        learn = "lsq" if learned else False
        weight = fq.QuantDescriptor(num_bits, narrow_range=True, learn_amax=learn)
        activation = fq.QuantDescriptor(num_bits, unsigned=True, learn_amax=learn)
        return fq.Recipe(tuple(fq.Rule(type=t, input=activation, weight=weight) for t in ("Conv2d", "Linear")))

    return recipe


def _int8(per_channel: bool) -> Callable[[bool], fq.Recipe]:
    return lambda learned: fq.preset("int8") if per_channel else _mobilenet_example().per_tensor()


_LONG = {
    "fixed ranges": Way(20, 0.03),
    "learned ranges": Way(20, 0.03, learned=True),
    "learned ranges, distilled": Way(20, 0.03, learned=True, distilled=True),
}
# A channel whose values are all rounded to 0 has no variance, by which a batch norm that is not frozen would divide.
_SHORT = {
    "1 % of the learning rate, 10 % of the steps": Way(3, FLOAT_LR / 100, frozen=True),
    "fixed ranges": Way(10, 0.02, frozen=True),
}

EXPERIMENTS = {
    "4 bits": Experiment("digits, narrow network, 4 bits", _narrow, _few_bits(4), "mse", _LONG),
    "3 bits": Experiment("digits, narrow network, 3 bits", _narrow, _few_bits(3), "mse", _LONG),
    "int8 per channel": Experiment("unequal channels, int8 per channel", _unequal, _int8(True), "max", _SHORT),
    "int8 per tensor": Experiment("unequal channels, int8 per tensor", _unequal, _int8(False), "max", _SHORT),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python tests/accuracy/recovery.py", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="a file to write the accuracies to, by experiment and seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| experiment | network | accuracy, mean (least to greatest) | of what PTQ lost, back |")
    print(f"|{'---|' * 4}")
    found = {}
    for name in options.names or EXPERIMENTS:
        found[name] = [run(EXPERIMENTS[name], seed) for seed in options.seeds]
        _print_rows(EXPERIMENTS[name].what, found[name])
    if options.json:
        options.json.write_text(json.dumps(found))


def _print_rows(what: str, found: list[dict[str, float]]) -> None:
    means = {row: statistics.fmean(scores[row] for scores in found) for row in found[0]}
    for row, mean in means.items():
        scores = [f"{of_seed[row]:.2f}" for of_seed in found]
        lost = means["float"] - means["PTQ"]
        back = "" if row in ("float", "PTQ") else f"{(mean - means['PTQ']) / lost * 100:.0f} %"
        print(f"| {what} | {row} | {mean:.2f} ({', '.join(scores)}) | {back} |", flush=True)


if __name__ == "__main__":
    main()
