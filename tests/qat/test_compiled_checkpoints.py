"""Gradient checkpointing inside a compiled model: gradients as in eager, or an error while something moves."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fakequant as fq
from fakequant import qat


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=False)


def fold(model, x):
    qat.fold_batchnorm(model, x)


def follow(model, x):
    qat.follow_ranges(model, 0.5)


@pytest.fixture
def x():
    return torch.randn(4, 3, 9, 9)


def model_after(recipe, x):
    model = Checkpointed()
    fq.quantize(model)
    fq.calibrate(model, [x], "max", progress=False)
    recipe(model, x)
    return model.train()


@pytest.mark.parametrize("recipe", [fold, follow])
def test_what_moves_is_an_error(recipe, x):
    model = model_after(recipe, x)
    with pytest.raises(Exception, match=r"TrainingError: expected no torch\.utils\.checkpoint inside a compiled model"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("recipe", [fold, follow])
def test_what_is_frozen_trains_as_in_eager(recipe, x):
    model = qat.freeze_batchnorm(model_after(recipe, x))
    qat.freeze_ranges(model)
    eager = copy.deepcopy(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    eager(x).square().sum().backward()
    for compiled, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, expected.grad)
