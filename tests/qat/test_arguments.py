"""Arguments of another kind, each refused with its name and nothing changed."""

import math
import re

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant import qat
from fakequant.errors import InvalidTypeError, InvalidValueError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def quantized():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    fq.quantize(model)
    fq.calibrate(model, [X], "max", progress=False)
    return model


OF_A_MODEL = {
    "average_ranges": qat.average_ranges,
    "broadcast_ranges": qat.broadcast_ranges,
    "check": qat.check,
    "float_teacher": qat.float_teacher,
    "fold_batchnorm": lambda model: qat.fold_batchnorm(model, X),
    "follow_ranges": qat.follow_ranges,
    "freeze_batchnorm": qat.freeze_batchnorm,
    "freeze_ranges": qat.freeze_ranges,
    "lower_bits": lambda model: qat.lower_bits(model, 4),
    "parameter_groups": lambda model: qat.parameter_groups(model, 0.1),
    "quantize_gradients": lambda model: qat.quantize_gradients(model, 4),
    "reestimate_weights": qat.reestimate_weights,
    "save_memory": qat.save_memory,
    "start_lsq_plus": qat.start_lsq_plus,
    "stop_saving_memory": qat.stop_saving_memory,
    "unfold_batchnorm": qat.unfold_batchnorm,
    "unfreeze_batchnorm": qat.unfreeze_batchnorm,
    "watch": qat.watch,
    "Distillation": qat.Distillation,
    "Distillation()": lambda model: qat.Distillation(nn.Linear(3, 2))(model, X),
    "Phases": lambda model: qat.Phases(model, {}),
}


@pytest.mark.parametrize("model", [None, "model", {}, nn.Linear], ids=repr)
@pytest.mark.parametrize("function", OF_A_MODEL.values(), ids=OF_A_MODEL)
def test_what_is_no_module_is_refused(function, model):
    with pytest.raises(InvalidTypeError, match="model: expected an nn.Module, got (NoneType|str|dict|Linear)"):
        function(model)


NEEDS_QUANTIZERS = [
    "broadcast_ranges",
    "check",
    "freeze_ranges",
    "lower_bits",
    "quantize_gradients",
    "reestimate_weights",
    "watch",
]


@pytest.mark.parametrize("name", NEEDS_QUANTIZERS)
def test_a_float_model_is_refused(name):
    with pytest.raises(InvalidValueError, match="model: expected a quantized model, got no quantizer in Linear"):
        OF_A_MODEL[name](nn.Linear(3, 2))


def optimizer():
    return torch.optim.SGD([nn.Parameter(X)], lr=0.1)


WRONG = {
    "momentum: expected a number, got True": lambda m: qat.follow_ranges(m, True),
    "momentum: expected a number, got '0.1'": lambda m: qat.follow_ranges(m, "0.1"),
    "num_bits: expected an int, got True": lambda m: qat.quantize_gradients(m, True),
    "num_bits: expected an int, got 4.0": lambda m: qat.quantize_gradients(m, 4.0),
    "num_bits: expected an int, got None": lambda m: qat.quantize_gradients(m, None),
    "num_bits['*']: expected an int, got 4.0": lambda m: qat.lower_bits(m, 4.0),
    "num_bits: expected patterns of names as keys, got 1": lambda m: qat.lower_bits(m, {1: 4}),
    "num_bits: expected bits for quantizers on integer grids, got no bits": lambda m: qat.lower_bits(m, {}),
    "lr: expected a number, got None": lambda m: qat.FineTuning(None, 10),
    "lr: expected a number, got [1]": lambda m: qat.parameter_groups(m, [1]),
    "lr: expected a number at least 0, got -5": lambda m: qat.parameter_groups(m, -5),
    "lr: expected a number above 0, got -5": lambda m: qat.check(m, lr=-5),
    "range_lr: expected a number at least 0, got -1": lambda m: qat.parameter_groups(m, 0.1, range_lr=-1),
    "weight_decay: expected a finite number at least 0, got nan": lambda m: qat.parameter_groups(
        m, 0.1, weight_decay=math.nan
    ),
    "steps: expected an int, got 1.5": lambda m: qat.FineTuning(0.1, 1.5),
    "steps: expected an int, got True": lambda m: qat.FineTuning(0.1, True),
    "steps: expected an int, got 0.1": lambda m: qat.FineTuning.after_training(10, 0.1),
    "steps: expected at least 1, got -5": lambda m: qat.FineTuning.after_training(0.1, -5),
    "step_fraction: expected a number above 0, got 0": lambda m: qat.FineTuning.after_training(
        0.1, 10, step_fraction=0
    ),
    "optimizer: expected an optimizer of torch, got Sequential": lambda m: qat.FineTuning(0.1, 1).scheduler(m),
    "optimizer: expected an optimizer of torch, got str": lambda m: qat.watch(m, "x"),
    "optimizer: expected an optimizer of torch, got type": lambda m: qat.watch(m, torch.optim.SGD),
    "optimizer: expected an optimizer of torch, got list": lambda m: qat.check(m, optimizer=[optimizer()]),
    "factor: expected a number, got '2'": lambda m: qat.watch(m, factor="2"),
    "temperature: expected a finite number above 0, got inf": lambda m: qat.Distillation(m, temperature=math.inf),
    "features: expected a list of names of modules, got '10'": lambda m: qat.Distillation(m, features="10"),
    "features: expected a list of names of modules, got [None]": lambda m: qat.Distillation(m, features=[None]),
    "logits: expected a function of the output, or None, got 'logits'": lambda m: qat.Distillation(m, logits="logits"),
    "class_dim: expected an int, got '1'": lambda m: qat.Distillation(m, class_dim="1"),
    "changes: expected {step: function}, got list": lambda m: qat.Phases(m, []),
    "steps: expected an int, got False": lambda m: qat.Phases(m, {}).load_state_dict({"steps": False}),
    "state: expected what Phases.state_dict returned, got None": lambda m: qat.Phases(m, {}).load_state_dict(None),
    "batches: expected tensors with elements, got none in 1": lambda m: qat.check(m, [X[:0]]),
}


def anatomy(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return repr(model), hooks, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("message", "call"), WRONG.items(), ids=WRONG)
def test_a_wrong_argument_is_named_and_changes_nothing(message, call):
    model = quantized()
    text, hooks, state = anatomy(model)
    with pytest.raises((InvalidTypeError, InvalidValueError), match=re.escape(message)):
        call(model)
    after = anatomy(model)
    assert after[:2] == (text, hooks)
    assert all(torch.equal(after[2][name], value) for name, value in state.items())


def test_a_tensor_may_be_a_learning_rate():
    assert qat.parameter_groups(quantized(), torch.tensor(0.1))[0]["lr"] == pytest.approx(0.1)
