import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fakequant
from fakequant import QuantDescriptor, follow_ranges, freeze_ranges, preset
from fakequant.errors import InvalidValueError
from fakequant.qat import average_ranges
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


def test_frozen_weights_without_a_range_keep_that_of_their_values():
    model = linear()
    follow_ranges(model)
    step(model, 1.0, 0.0)
    freeze_ranges(model)
    assert model.weight_quantizer.amax.flatten().tolist() == model.weight.abs().amax(1).tolist()
    before = model.weight_quantizer.amax.clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(model.weight_quantizer.amax, before)


def test_calibrated_ranges_of_weights_stay_when_frozen():
    model = linear()
    fakequant.calibrate(model, [torch.ones(1, 2)], progress=False)
    before = model.weight_quantizer.amax.clone()
    follow_ranges(model)
    nn.init.ones_(model.weight)
    freeze_ranges(model)
    assert torch.equal(model.weight_quantizer.amax, before)


def test_freezing_changes_nothing_where_nothing_follows():
    model = linear()
    freeze_ranges(model)
    assert model.weight_quantizer.amax is None


@pytest.mark.parametrize("grid", [{"amax": 2.0}, {"dynamic": True}, {"learn_amax": "lsq"}], ids=str)
def test_a_model_that_cannot_follow_is_refused(grid):
    with pytest.raises(InvalidValueError, match="expected an activation quantizer whose range comes from data"):
        follow_ranges(linear(**grid))


def test_freezing_what_never_ran_warns_with_its_name():
    model = nn.Sequential(linear(), linear())
    follow_ranges(model)
    model[0].train()(torch.ones(1, 2))
    with pytest.warns(UserWarning, match="1._input_quantizer: expected a range from a forward in training mode"):
        freeze_ranges(model)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_a_bad_momentum_is_refused(momentum):
    with pytest.raises(InvalidValueError, match="momentum: expected a (finite )?number above 0 and at most 1"):
        follow_ranges(linear(), momentum)


def test_following_compiles_without_a_graph_break():
    model = linear()
    follow_ranges(model, momentum=0.5)
    step(model, 1.0, 0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([[3.0, 0.0]]))
    assert model.input_quantizer.amax == 2.0


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_moves_nothing(value, affine):
    model = linear(affine=affine)
    follow_ranges(model, momentum=0.5)
    step(model, 4.0, -1.0)
    before = model.input_quantizer.amax.clone(), model.input_quantizer.amin
    step(model, value, value)
    assert (model.input_quantizer.amax, model.input_quantizer.amin) == before


def test_a_first_step_that_is_not_finite_leaves_the_range_unknown():
    model = linear()
    follow_ranges(model)
    step(model, float("inf"), 0.0)
    assert model.input_quantizer.amax is None


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_the_weight_of_a_function_does_not_follow():
    model = Function()
    fakequant.quantize(model, example_inputs=(torch.ones(1, 2),))
    follow_ranges(model)
    moving = [name for name, q in fakequant.nn.walk.named_quantizers(model) if q.momentum is not None]
    assert moving == ["_call_sites.linear_0.input"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_moves_a_range_once(use_reentrant):
    model = linear()
    follow_ranges(model, momentum=0.5)
    step(model, 4.0, -1.0)
    x = torch.tensor([[2.0, -1.0]], requires_grad=True)
    checkpoint(model.train(), x, use_reentrant=use_reentrant).sum().backward()
    assert model.input_quantizer.amax == 3.0


def test_an_empty_batch_moves_nothing():
    model = linear()
    follow_ranges(model, momentum=0.5)
    step(model, 4.0, -1.0)
    model(torch.zeros(0, 2))
    assert model.input_quantizer.amax == 4.0


def test_averaging_changes_nothing_where_nothing_is_distributed():
    model = linear()
    follow_ranges(model)
    step(model, 3.0, 0.0)
    average_ranges(model)
    assert model.input_quantizer.amax == 3.0


@pytest.mark.parametrize(
    ("following", "message"),
    [(False, "got none that follow"), (True, "got none for _input_quantizer in process 0")],
    ids=["none follows", "unknown"],
)
def test_averaging_needs_known_ranges_that_follow(following, message):
    model = linear()
    if following:
        follow_ranges(model)
    with pytest.raises(InvalidValueError, match=f"expected known ranges that follow the data, {message}"):
        average_ranges(model)


def test_freezing_names_a_weight_that_is_not_finite_and_changes_nothing():
    model = nn.Sequential(linear(), linear())
    follow_ranges(model)
    model[1].weight.data[0] = torch.nan
    with pytest.raises(InvalidValueError, match="1._weight_quantizer: amax: expected finite values >= 0"):
        freeze_ranges(model)
    assert model[0].input_quantizer.momentum
    assert not model[0].weight_quantizer.is_calibrated
