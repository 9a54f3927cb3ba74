"""One quantization-aware training step against one float step, eager and compiled."""

import sys

import torch
import torch.nn.functional as F
from networks import network
from timing import print_ratios
from torch import nn

import fakequant as fq


def _step(model: nn.Module, compiled: bool) -> object:
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step


def _quantized() -> nn.Module:
    model = network("resnet18")
    fq.quantize(model)
    fq.calibrate(model, [torch.randn(16, 3, 64, 64)], "max", progress=False)
    return model.train()


def main() -> None:
    """ResNet-18, 64x64, batch 16."""
    for compiled in (False,) if "--eager" in sys.argv else (False, True):
        print_ratios(
            f"training step, ResNet-18 64x64, batch 16, {'torch.compile, no graph break' if compiled else 'eager'}",
            {"float": _step(network("resnet18").train(), compiled), "QAT": _step(_quantized(), compiled)},
            rounds=15,
        )


if __name__ == "__main__":
    main()
