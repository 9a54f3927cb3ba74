"""qat.check: a sound model has no problem, and each planted fault is found with its name."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fakequant
from fakequant import qat
from fakequant.errors import InvalidTypeError, InvalidValueError, TrainingError
from fakequant.nn import QuantLinear
from fakequant.nn.walk import named_quantizers

LEARNED = fakequant.QuantDescriptor(learn_amax="lsq")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(4, 1, 6, 6) for _ in range(2)]


@pytest.fixture
def model(batches) -> nn.Module:
    """The ranges of the head are learned; everything is calibrated."""
    model = network()
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule("4", input=LEARNED))
    fakequant.calibrate(model, batches, progress=False)
    return model.train()


def lines(findings) -> list[str]:
    return [str(finding) for finding in findings]


def sgd(model: nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def sqnr_db(signal: Tensor, noisy: Tensor) -> float:
    signal, noisy = (v.detach().double().numpy() for v in (signal, noisy))
    return float(10 * np.log10((signal**2).sum() / ((noisy - signal) ** 2).sum()))


# A sound model.


def test_a_sound_model_has_no_problem(model, batches):
    qat.freeze_batchnorm(model)
    report = qat.check(model, batches, optimizer=sgd(model, lr=0.001), lr=0.1)
    assert lines(report.findings) == []
    assert report.raise_for_problems() is report


def test_output_error_is_that_against_the_float_model(batches):
    model = network()
    floats = copy.deepcopy(model).eval()
    fakequant.quantize(model)
    fakequant.calibrate(model, batches, progress=False)
    [output] = qat.check(model, batches).outputs
    expected = sqnr_db(torch.cat([floats(x) for x in batches]), torch.cat([model.eval()(x) for x in batches]))
    assert (output.name, output.sqnr_db) == ("output", pytest.approx(expected))


def test_quantizers_errors_are_those_of_their_grids(batches):
    model = nn.Sequential(nn.Flatten(), QuantLinear(36, 3))
    quantizer = model[1].input_quantizer
    quantizer.amax = model[1].weight_quantizer.amax = 1.5
    x = torch.cat(batches).flatten(1)
    rounded = np.clip(np.rint(x.numpy() / np.float32(1.5 / 127)), -128, 127) * (1.5 / 127)
    errors = {error.name: error.sqnr_db for error in qat.check(model, batches).quantizers}
    assert errors["1._input_quantizer"] == pytest.approx(sqnr_db(x, torch.from_numpy(rounded)), abs=1e-3)
    assert list(errors.values()) == sorted(errors.values())


def test_outputs_of_a_tree_have_their_places():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QuantLinear(2, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": self.layer(x), "others": (x, torch.tensor(3))}

    assert [o.name for o in qat.check(Both(), [torch.ones(1, 2)]).outputs] == [
        "output['logits']",
        "output['others'][0]",
    ]


def test_the_model_stays_as_it_is(model, batches):
    qat.follow_ranges(model)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
    qat.check(model, batches, optimizer=sgd(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(quantizer.is_enabled for _, quantizer in named_quantizers(model))


def test_weights_need_no_range_while_ranges_follow(batches):
    model = network().train()
    fakequant.quantize(model)
    qat.follow_ranges(model)
    assert not qat.check(model).problems


def test_a_learned_weight_needs_a_range_even_then(batches):
    layer = QuantLinear(6, 2, quant_desc_weight=LEARNED)
    qat.follow_ranges(layer)
    assert [problem.name for problem in qat.check(layer).problems] == ["_weight_quantizer"]


def test_quantizers_of_another_target_are_no_matter(batches):
    model = network()  # so small that TensorRT leaves its head float
    fakequant.quantize(model, example_inputs=batches[0], target="tensorrt")
    fakequant.calibrate(model, batches, progress=False)
    standing_by = [quantizer for _, quantizer in named_quantizers(model) if quantizer.stands_by]
    assert standing_by
    standing_by[0].enable_calib()
    found = lines(qat.check(model, batches).findings)
    assert not any("switched off" in line or "collect statistics" in line for line in found)


def test_signs_may_be_far_from_their_weights(batches):
    layer = QuantLinear(6, 2, quant_desc_weight=fakequant.QuantDescriptor(1, scheme="bnn"))
    layer.input_quantizer.amax = 4.0
    report = qat.check(layer, batches)
    assert min(error.sqnr_db for error in report.quantizers) < 0
    assert not report.problems


# Planted faults: each is a function of (model, batches) that returns other arguments of check.


def forget_a_range(model, batches):
    model[0].input_quantizer.amax = None
    return {}


def forget_the_range_of_a_weight(model, batches):
    model[0].weight_quantizer.amax = None
    return {}


def follow_beside_a_learned_range(model, batches):
    model[4].input_quantizer.amax = None
    qat.follow_ranges(model)
    return {}


def spoil_a_range(model, batches):
    model[4].input_quantizer._amax.data.fill_(float("nan"))
    return {}


def zero_a_range(model, batches):
    model[0].input_quantizer.amax = 0.0
    return {}


def zero_a_channel(model, batches):
    model[0].weight_quantizer._amax[1] = 0.0
    return {}


def switch_one_off(model, batches):
    model[4].weight_quantizer.disable_quant()
    return {}


def collect(model, batches):
    model[4].input_quantizer.enable_calib()
    return {}


def nothing(model, batches):
    return {}


def evaluate(model, batches):
    model.eval()
    return {}


def go_around_a_layer(model, batches):
    head = model[4]
    model[4].forward = lambda x: nn.functional.linear(x, head.weight)
    return {"batches": batches}


def feed_nan(model, batches):
    batches[1][0, 0, 0, 0] = float("nan")
    return {"batches": batches}


def feed_other_data(model, batches):
    model[4].input_quantizer._amax.data.mul_(1e-3)
    return {"batches": batches}


def lose_the_weights(model, batches):
    model[4].bias.data.zero_()
    model[4].weight_quantizer._amax.mul_(1e3)
    return {"batches": batches}


def depend_on_values(model, batches):
    return {"batches": batches, "forward": lambda model, x: model(x)[: 1 + model[0].input_quantizer.is_enabled]}


def return_an_object(model, batches):
    return {"batches": batches, "forward": lambda model, x: SimpleNamespace(logits=model(x))}


def leave_out_a_range(model, batches):
    others = [parameter for name, parameter in model.named_parameters() if "quantizer" not in name]
    return {"optimizer": torch.optim.SGD(others, lr=0.1)}


def leave_out_a_layer(model, batches):
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("0.")]
    return {"optimizer": torch.optim.SGD(others, lr=0.1)}


def train_a_copy(model, batches):
    return {"optimizer": sgd(copy.deepcopy(model))}


def calibrate_too_late(model, batches):
    model[4].input_quantizer.amax = None
    optimizer = sgd(model, momentum=0.9)
    model(batches[0]).sum().backward()
    model[4].input_quantizer._amax.grad = torch.zeros(0)
    optimizer.step()
    model[4].input_quantizer.amax = 1.0
    return {"optimizer": optimizer}


def load_a_range_of_another_layer(model, batches):
    model.load_state_dict({**model.state_dict(), "0._weight_quantizer._amax": torch.ones(7, 1, 1, 1)})
    return {}


def switch_all_off(model, batches):
    for _, quantizer in named_quantizers(model):
        quantizer.disable()
    return {}


def decay(model, batches):
    return {"optimizer": sgd(model, weight_decay=1e-4)}


def train_fast(model, batches):
    return {"optimizer": sgd(model, lr=0.1), "lr": 0.5}


def plan(model, batches):
    return {"lr": 0.5}


PROBLEMS = {
    forget_a_range: "0._input_quantizer: expected a range, got none",
    forget_the_range_of_a_weight: "0._weight_quantizer: expected a range, got none",
    follow_beside_a_learned_range: "4._input_quantizer: expected a range, got none",
    load_a_range_of_another_layer: "0._weight_quantizer: amax: expected shape (4, 1, 1, 1) for inputs of shape",
    switch_all_off: "model: expected a quantizer that quantizes, got 4 that are off or wait for another target",
    spoil_a_range: "4._input_quantizer: expected a finite range, got NaN",
    zero_a_range: "0._input_quantizer: expected a range above 0, got 0",
    go_around_a_layer: "4._input_quantizer: expected a call, got none in 2 batches",
    feed_nan: "0._input_quantizer: expected finite values, got NaN or Inf, as in",
    feed_other_data: "4._input_quantizer: expected twice as much signal as noise, got 0.0 dB",
    leave_out_a_range: "4._input_quantizer._amax: expected the optimizer to have this learned range, got none",
    train_a_copy: "model: 7 parameters of the optimizer are not the model's, of shapes (4, 1, 3, 3), (4,)",
    calibrate_too_late: "4._input_quantizer._amax: expected momentum_buffer of shape (1,) in the optimizer, got (0,)",
}

HINTS = {
    zero_a_channel: "0._weight_quantizer: 1 of 4 ranges are 0",
    switch_one_off: "model: 1 quantizers are switched off: 4._weight_quantizer",
    collect: "model: 1 quantizers collect statistics in every call: 4._input_quantizer",
    nothing: "model: 1 batch norms move their statistics in training: 1. Freeze them",
    evaluate: "model: is in eval mode",
    lose_the_weights: "output: expected twice as much signal as noise against the float model, got 0.0 dB",
    depend_on_values: "output: is not compared: its shape is another in the float model",
    return_an_object: "model: returns no tensor that could be compared",
    leave_out_a_layer: "model: the optimizer has not 2 parameters that require a gradient: 0.weight, 0.bias",
    decay: "model: 1 learned ranges have weight decay 0.0001: 4._input_quantizer",
    train_fast: "model: the float training had the learning rate 0.5, this one 0.1. Begin at 0.005",
    plan: "model: the float training had the learning rate 0.5. Begin at 0.005",
}


def named(fault) -> str:
    return fault.__name__


@pytest.mark.parametrize("fault", PROBLEMS, ids=named)
def test_a_problem_is_found_by_name(model, batches, fault):
    found = lines(qat.check(model, **fault(model, batches)).problems)
    assert any(line.startswith(PROBLEMS[fault]) for line in found), found


@pytest.mark.parametrize("fault", HINTS, ids=named)
def test_a_hint_is_given_by_name(model, batches, fault):
    found = lines(qat.check(model, **fault(model, batches)).hints)
    assert any(line.startswith(HINTS[fault]) for line in found), found


@pytest.mark.parametrize("fault", PROBLEMS, ids=named)
def test_problems_are_raised_on_request(model, batches, fault):
    report = qat.check(model, **fault(model, batches))
    with pytest.raises(TrainingError, match=f"{len(report.problems)} problems:\n"):
        report.raise_for_problems()


def test_the_report_is_a_table(model, batches):
    model[0].input_quantizer.amax = None
    rows = str(qat.check(model, batches)).splitlines()
    assert rows[0].startswith("against the float model, 2 batches: output ")
    assert [row for row in rows if row.endswith(":")] == ["noisiest quantizers:", "problems:", "hints:"]


# What is refused.


def test_a_float_model_is_refused():
    with pytest.raises(InvalidValueError, match="expected a quantized model, got no quantizer in Sequential"):
        qat.check(network())


def test_no_batch_is_refused(model):
    with pytest.raises(InvalidValueError, match="batches: expected at least one, got none"):
        qat.check(model, [])


def test_a_batch_of_another_kind_is_refused(model):
    with pytest.raises(InvalidTypeError, match="batch: expected a tensor"):
        qat.check(model, ["an image"])


@pytest.mark.parametrize("lr", [0.0, float("inf")])
def test_a_learning_rate_that_is_none_is_refused(model, lr):
    with pytest.raises(InvalidValueError, match="lr: expected a (finite )?number above 0"):
        qat.check(model, lr=lr)


def test_a_norm_that_was_converted_after_folding_is_a_problem(batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    fakequant.quantize(model)
    x = torch.rand(2, 3, 8, 8)
    fakequant.calibrate(model, [x], progress=False)
    qat.fold_batchnorm(model, x)
    model[1] = nn.SyncBatchNorm(4)
    (problem,) = qat.check(model).problems
    assert "0: expected the batch norm that was folded into it" in str(problem)
