"""What is learned, by which network, and how: data that scikit-learn ships, cut in halves that test each other."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from networks import Perceptron, SignNet
from sklearn import datasets
from torch import Tensor, nn

from fakequant.demo.quickstart import DigitNet, Split, Splits, train


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        network: makes an untrained one.
        load: returns the inputs [N, ...] and the labels [N].
        shuffles: how often the data is cut. Every sample is tested once in each.
        epochs: of float training.
    """

    network: Callable[[], nn.Module]
    load: Callable[[], Split]
    shuffles: int
    epochs: int

    def splits(self) -> list[Splits]:
        """Return ((training inputs, labels), (test inputs, labels)) of each cut, both ways round."""
        data = self.load()
        return [split for seed in range(self.shuffles) for split in halves(data, seed)]

    @functools.cache  # noqa: B019 - tasks live as long as the process
    def trained(self) -> list[nn.Module]:
        """Return the float network of each split."""
        models = []
        for training, _ in self.splits():
            torch.manual_seed(0)
            model = self.network()
            train(model, training, self.epochs, learning_rate=0.1)
            models.append(model)
        return models


def halves(data: Split, seed: int) -> list[Splits]:
    """Return a random half for training and the other one for the test, and the same the other way round."""
    inputs, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one, other = ((inputs[half], labels[half]) for half in order.chunk(2))
    return [(one, other), (other, one)]


def digits() -> Split:
    """1797 images of 8x8 handwritten digits."""
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def _pixels() -> Split:
    """The digits as rows of 64 numbers."""
    images, labels = digits()
    return images.flatten(1), labels


def _tumours() -> Split:
    """30 measurements of each of 569 tumours; labels say which are malignant."""
    data = datasets.load_breast_cancer()
    inputs: Tensor = torch.tensor(data.data, dtype=torch.float32)
    return (inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(data.target)


DIGITS = Task(DigitNet, digits, shuffles=1, epochs=15)
SIGNS = Task(SignNet, digits, shuffles=1, epochs=15)
PIXELS = Task(functools.partial(Perceptron, 64, 256, 10), _pixels, shuffles=1, epochs=15)
TUMOURS = Task(functools.partial(Perceptron, 30, 64, 2), _tumours, shuffles=3, epochs=20)
