import pytest
import torch
from torch import nn

import fakequant
from fakequant import QuantDescriptor, Rule, preset
from fakequant.qat import parameter_groups

LSQ = QuantDescriptor(4, learn_amax="lsq")
LSQ_PLUS = QuantDescriptor(4, affine=True, learn_amax="lsq+")


def model(**grids: QuantDescriptor) -> nn.Module:
    built = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    fakequant.quantize(built, preset("int8") + Rule("*", type="Linear", **grids))
    fakequant.calibrate(built, [torch.randn(4, 3)], progress=False)
    return built


def names(model: nn.Module, group: dict) -> set[str]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(parameter)] for parameter in group["params"]}


def test_ranges_are_a_group_of_their_own():
    built = model(input=LSQ_PLUS, weight=LSQ)
    others, ranges = parameter_groups(built, 0.1)
    kinds = ("_input_quantizer._amax", "_input_quantizer._amin", "_weight_quantizer._amax")
    assert names(built, ranges) == {f"{layer}.{kind}" for layer in (0, 2) for kind in kinds}
    assert names(built, others) == {f"{layer}.{kind}" for layer in (0, 1, 2) for kind in ("weight", "bias")}


def test_without_learned_ranges_there_is_one_group():
    built = model()
    (group,) = parameter_groups(built, 0.1)
    assert list(map(id, group["params"])) == list(map(id, built.parameters()))


@pytest.mark.parametrize(("range_lr", "expected"), [(None, 0.1), (0.5, 0.5), (0.0, 0.0)])
def test_each_group_has_its_rate(range_lr, expected):
    groups = parameter_groups(model(input=LSQ), 0.1, range_lr=range_lr)
    assert [group["lr"] for group in groups] == [0.1, expected]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_leaves_ranges_alone(optimizer):
    built = model(input=LSQ)
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(parameter_groups(built, 0.1, weight_decay=0.5)).step()
    shrunk = {name for name, parameter in built.named_parameters() if not torch.equal(parameter, before[name])}
    assert shrunk == {name for name in before if "quantizer" not in name} - {"1.bias"}  # which is 0


def test_a_range_that_two_layers_share_comes_once():
    built = model(input=LSQ)
    built[2]._input_quantizer = built[0]._input_quantizer
    assert len(parameter_groups(built, 0.1)[1]["params"]) == 1


def test_a_wrapped_model_will_do():
    built = model(input=LSQ)
    wrapped = nn.Sequential(built)
    assert [len(group["params"]) for group in parameter_groups(wrapped, 0.1)] == [6, 2]
