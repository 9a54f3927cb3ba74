"""Gradient checkpointing while ranges follow or folded norms move: the right gradients, or an error."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fakequant as fq
from fakequant import qat
from fakequant.errors import TrainingError


class Checkpointed(nn.Module):
    """A block that is checkpointed; with a residual its input has another reader with the same quantizer."""

    def __init__(self, is_on=True, is_residual=False):
        super().__init__()
        self.is_on, self.is_residual = is_on, is_residual
        self.first = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        x = self.first(x)
        block = checkpoint(self.block, x, use_reentrant=False) if self.is_on else self.block(x)
        return x + block if self.is_residual else block


def fold(model, x):
    qat.fold_batchnorm(model, x)


def follow(model, x):
    qat.follow_ranges(model, 0.5)


@pytest.fixture
def x():
    return torch.randn(4, 3, 9, 9)


def model_after(recipe, x, **options):
    model = Checkpointed(**options)
    with_sites = {"example_inputs": x} if model.is_residual else {}
    fq.quantize(model, fq.preset("int8") + fq.Rule(type="Conv2d", force=True), **with_sites)
    fq.calibrate(model, [x], "max", progress=False)
    recipe(model, x)
    return model.train()


def train(model, x, steps=3):
    """Gradients of each step; the weights stay."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        model(x).square().mean().backward()
        found += [parameter.grad.clone() for parameter in model.parameters()]
    return found


recipes = pytest.mark.parametrize("recipe", [fold, follow])


@recipes
def test_one_call_a_step_trains_as_without_checkpoint(recipe, x):
    model = model_after(recipe, x, is_on=True)
    plain = copy.deepcopy(model)
    plain.is_on = False
    # One step: checkpointing moves the statistics of torch's own norms twice in each.
    for found, expected in zip(train(model, x, steps=1), train(plain, x, steps=1), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_range_that_another_call_moved_is_an_error(x):
    model = model_after(follow, x, is_residual=True)
    with pytest.raises(TrainingError, match="amax=.* expected one call between two backward passes.* got 2"):
        model(x).sum().backward()


@recipes
def test_two_forwards_before_a_backward_are_an_error(recipe, x):
    model = model_after(recipe, x, is_on=True)
    loss = (model(x) - model(2 * x)).square().sum()
    with pytest.raises(TrainingError, match="expected one call between two backward passes.* got 2"):
        loss.backward()


@recipes
def test_forwards_that_are_no_step_do_not_count(recipe, x):
    model = model_after(recipe, x, is_on=True)
    with torch.no_grad():
        model(x), model(x)  # as torch.optim.swa_utils.update_bn does, which then calls train()
    train(model.train(), x)


@recipes
def test_what_moves_is_an_error_in_a_compiled_model(recipe, x):
    model = model_after(recipe, x)
    with pytest.raises(Exception, match=r"TrainingError: expected no torch\.utils\.checkpoint inside a compiled model"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


@recipes
def test_what_is_frozen_trains_compiled_as_in_eager(recipe, x):
    model = qat.freeze_batchnorm(model_after(recipe, x))
    qat.freeze_ranges(model)
    eager = copy.deepcopy(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    eager(x).square().sum().backward()
    for compiled, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, expected.grad)
