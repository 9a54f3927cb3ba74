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
        inputs, labels = self.load()
        found = []
        for seed in range(self.shuffles):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            one, other = ((inputs[half], labels[half]) for half in order.chunk(2))
            found += [(one, other), (other, one)]
        return found

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


def _digits() -> Split:
    """1797 images of 8x8 handwritten digits."""
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def _pixels() -> Split:
    """The digits as rows of 64 numbers."""
    images, labels = _digits()
    return images.flatten(1), labels


def _tumours() -> Split:
    """30 measurements of each of 569 tumours; labels say which are malignant."""
    data = datasets.load_breast_cancer()
    inputs: Tensor = torch.tensor(data.data, dtype=torch.float32)
    return (inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(data.target)


DIGITS = Task(DigitNet, _digits, shuffles=1, epochs=15)
SIGNS = Task(SignNet, _digits, shuffles=1, epochs=15)
PIXELS = Task(functools.partial(Perceptron, 64, 256, 10), _pixels, shuffles=1, epochs=15)
TUMOURS = Task(functools.partial(Perceptron, 30, 64, 2), _tumours, shuffles=3, epochs=20)
