"""The networks that are trained: see also ``fakequant.demo.quickstart.DigitNet``."""

import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.demo.quickstart import Block


class _BinaryBlock(nn.Module):
    """Batch norm, hard tanh, convolution, as XNOR-Net orders them (arXiv:1603.05279, section 3.2), and a shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.repeats = out_channels // channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.hardtanh(self.norm(x)))
        skip = x if y.shape == x.shape else F.avg_pool2d(x, 2).repeat(1, self.repeats, 1, 1)
        return y + skip


class SignNet(nn.Module):
    """A network whose inner convolutions can be binary, [N, 1, 8, 8] to [N, 10]; the first and last layer are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.blocks = nn.Sequential(_BinaryBlock(24, 24, 1), _BinaryBlock(24, 48, 2), _BinaryBlock(48, 48, 1))
        self.norm = nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Perceptron(nn.Sequential):
    """Three linear layers, [N, inputs] to [N, classes]."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        super().__init__(*layers, nn.Linear(hidden, classes))


class NarrowNet(nn.Sequential):
    """A residual network of few channels, which few bits cost more than a wide one, [N, 1, 8, 8] to [N, 10]."""

    def __init__(self, channels: int = 4) -> None:
        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        blocks = layer(1, channels, 1), Block(channels), layer(channels, 2 * channels, 2), Block(2 * channels)
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10))
