"""The table that tutorials show for MobileNetV2 (float, per-tensor, per-channel, QAT), on real digits, in a minute.

    python examples/mobilenet_table.py        (a number behind it is the seed, else 0)

Per-tensor weights lose much of the accuracy, per-channel weights with histograms little, and
fine-tuning recovers the rest. What makes per-tensor weights fail in MobileNetV2 is that the ranges
of channels are far apart (Nagel et al. 2019, arXiv:1906.04721, section 3.1), which they are not in a
network that was trained for seconds. So they are moved apart here by the inverse of that paper's
equalization: the channels that go into a depthwise convolution times powers of two, its weights
divided by the same. The float network computes what it did before.
"""

import copy
import sys

import torch
from torch import Tensor, nn

import fakequant as fq
from fakequant.demo.quickstart import accuracy, load_digits, train

METHODS = ("max", "percentile", "mse", "entropy")
EPOCHS, FINE_TUNING_EPOCHS = 15, 10
OCTAVES = 4
"""The ranges of the channels are up to twice as many octaves apart."""


def _layer(channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 (arXiv:1801.04381), with ReLU in place of ReLU6: it lets a scale through."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand = nn.Sequential(*_layer(channels, wide, 1), nn.ReLU())
        self.depthwise = nn.Sequential(*_layer(wide, wide, 3, stride, groups=wide), nn.ReLU())
        self.project = nn.Sequential(*_layer(wide, out_channels, 1))
        self.has_skip = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_skip else y


class MobileDigitNet(nn.Sequential):
    """[N, 1, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(*_layer(1, 16, 3), nn.ReLU()),
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 24, 2),
            InvertedResidual(24, 24, 1),
            InvertedResidual(24, 32, 2),
            nn.Sequential(*_layer(32, 64, 1), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


@torch.no_grad()
def move_ranges_apart(model: nn.Module, octaves: int, generator: torch.Generator) -> None:
    """Scale what goes into each depthwise convolution by powers of two up to 2**octaves, and its weights back."""
    for block in model.modules():
        if isinstance(block, InvertedResidual):
            (_, norm, _), conv = block.expand, block.depthwise[0]
            scale = 2.0 ** torch.randint(-octaves, octaves + 1, (norm.num_features,), generator=generator)
            norm.weight *= scale
            norm.bias *= scale
            conv.weight /= scale.reshape(-1, 1, 1, 1)


def per_tensor() -> fq.Recipe:
    """Return int8 with one range for the whole weight of a layer."""
    grid = fq.QuantDescriptor(8, narrow_range=True)
    return fq.Recipe(tuple(fq.Rule(type=name, weight=grid) for name in ("Conv2d", "Linear")))


def quantized(model: nn.Module, recipe: str | fq.Recipe, batches: list[Tensor], method: str) -> nn.Module:
    """Return a calibrated copy."""
    model = copy.deepcopy(model)
    fq.quantize(model, recipe, example_inputs=batches[0], target="onnxruntime")
    fq.calibrate(model, batches, method=method, progress=False)
    return model


def main(seed: int = 0) -> dict[str, float]:
    """Train, quantize in each way, print the table, and return it: accuracy in percent by row."""
    torch.manual_seed(seed)
    training, test = load_digits()
    model = MobileDigitNet()
    train(model, training, epochs=EPOCHS, learning_rate=0.1)
    before = model(test[0])
    move_ranges_apart(model, OCTAVES, torch.Generator().manual_seed(seed))
    print(f"moving the ranges apart changed the logits by at most {(model(test[0]) - before).abs().max():g}")

    batches = list(training[0][:512].split(64))
    table = {"float": accuracy(model, test)}
    table["int8 PTQ, per-tensor weights, max"] = accuracy(quantized(model, per_tensor(), batches, "max"), test)
    models = {method: quantized(model, "int8", batches, method) for method in METHODS}
    table |= {f"int8 PTQ, per-channel weights, {method}": accuracy(found, test) for method, found in models.items()}
    trained = fq.freeze_batchnorm(models["percentile"])
    train(trained, training, epochs=FINE_TUNING_EPOCHS, learning_rate=0.02)
    table[f"int8 QAT, {FINE_TUNING_EPOCHS} epochs from percentile"] = accuracy(trained, test)
    for name, percent in table.items():
        print(f"{name:<42}{percent:>7.2f} %")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # for layers this small, more threads mostly wait for each other
    main(*map(int, sys.argv[1:]))
