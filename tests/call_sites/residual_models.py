"""Models for these tests. This file is loaded by the conftest and, from a pickle, in other processes."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """conv, bn, relu, conv, bn, and the input added; the sum is the block's only call site."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.running_mean, -0.3, 0.3)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + x)


class Net(nn.Module):
    """Two blocks, of which the second is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.block1 = Block()
        self.block2 = Block()
        self.fc = nn.Linear(16, 20)

    def forward(self, x):
        x = self.block1(x)
        for _ in range(2):
            x = self.block2(x)
        return self.fc(x.mean((2, 3)))


def net():
    """The same weights in every process."""
    torch.manual_seed(0)
    return Net().eval()
