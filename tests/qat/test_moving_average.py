import pytest
import torch
from torch import nn

import fakequant
from fakequant import QuantDescriptor, follow_ranges, freeze_ranges, preset
from fakequant.errors import InvalidValueError
from fakequant.recipe import Rule


def linear(**grid: object) -> nn.Module:
    model = nn.Linear(2, 2)
    fakequant.quantize(model, preset("int8") + Rule("", input=QuantDescriptor(8, **grid)))
    return model


def step(model: nn.Module, *values: float) -> None:
    model(torch.tensor([values]))


def test_a_range_is_the_moving_average_of_the_batches():
    model = linear()
    follow_ranges(model, momentum=0.1)
    expected = None
    for amax in (1.0, 3.0, 0.5, 7.0):
        step(model, amax, -0.1)
        expected = amax if expected is None else 0.9 * expected + 0.1 * amax
    assert float(model.input_quantizer.amax) == pytest.approx(expected)


def test_both_ends_of_an_affine_range_follow():
    model = linear(affine=True)
    follow_ranges(model, momentum=0.5)
    step(model, 4.0, -1.0)
    step(model, 2.0, -3.0)
    assert (model.input_quantizer.amax, model.input_quantizer.amin) == (3.0, -2.0)


def test_a_calibrated_range_is_where_it_starts():
    model = linear()
    fakequant.calibrate(model, [torch.tensor([[8.0, 0.0]])], progress=False)
    follow_ranges(model, momentum=0.25)
    step(model, 4.0, 0.0)
    assert model.input_quantizer.amax == 7.0


@pytest.mark.parametrize(
    "stop",
    [lambda m: m.eval(), freeze_ranges, lambda m: m.input_quantizer.disable()],
    ids=["eval", "frozen", "disabled"],
)
def test_a_range_stays_in_eval_mode_frozen_or_disabled(stop):
    model = linear()
    follow_ranges(model)
    step(model, 1.0, 0.0)
    stop(model)
    step(model, 9.0, 0.0)
    assert model.input_quantizer.amax == 1.0


def test_ranges_of_weights_stay():
    model = linear()
    follow_ranges(model)
    step(model, 1.0, 0.0)
    assert model.weight_quantizer.amax is None


@pytest.mark.parametrize("grid", [{"amax": 2.0}, {"dynamic": True}, {"learn_amax": "lsq"}], ids=str)
def test_a_model_that_cannot_follow_is_refused(grid):
    with pytest.raises(InvalidValueError, match="expected an activation quantizer whose range comes from data"):
        follow_ranges(linear(**grid))


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_a_bad_momentum_is_refused(momentum):
    with pytest.raises(InvalidValueError, match="momentum: expected above 0 and at most 1"):
        follow_ranges(linear(), momentum)


def test_following_compiles_without_a_graph_break():
    model = linear()
    follow_ranges(model, momentum=0.5)
    step(model, 1.0, 0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([[3.0, 0.0]]))
    assert model.input_quantizer.amax == 2.0
