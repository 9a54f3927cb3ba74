import numpy as np
import pytest
import torch
from torch import nn

import fakequant
from fakequant import QuantDescriptor, Rule, preset, retarget
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import QuantLinear
from fakequant.nn.walk import named_quantizers
from fakequant.qat import lower_bits, reestimate_weights


def network(*rules: Rule) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    recipe = preset("int8")
    for rule in rules:
        recipe = recipe + rule
    fakequant.quantize(model, recipe)
    return model


def bits(model: nn.Module) -> dict[str, object]:
    return {name.replace("_quantizer", ""): q.num_bits for name, q in named_quantizers(model)}


def test_every_quantizer_has_the_bits():
    model = network()
    lower_bits(model, 5)
    assert set(bits(model).values()) == {5}


def test_the_values_are_as_many_as_the_bits_say():
    model = network()
    fakequant.calibrate(model, [torch.randn(8, 4)], progress=False)
    lower_bits(model, 2)
    x = torch.linspace(-9, 9, 400).expand(4, 400)
    assert len(np.unique(model[0].input_quantizer(x).numpy())) == 4
    assert len(np.unique(model[0].weight_quantizer(x)[0].numpy())) == 3  # a narrow range


def placed(**rule: object) -> nn.Module:
    """A network with the grids of every target, for ONNX Runtime now."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    recipe = preset("int8") + Rule(type="Linear", force=True) + Rule("1", force=True, **rule)
    fakequant.quantize(model, recipe, example_inputs=torch.ones(2, 4), target="onnxruntime")
    return model


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "onnxruntime-cuda"])
def test_they_hold_on_every_target(target):
    model = placed()
    lower_bits(model, {"*": 6, "1.*": 4})
    retarget(model, target)
    assert (model[0].weight_quantizer.num_bits, model[1].weight_quantizer.num_bits) == (6, 4)


@pytest.mark.parametrize("trained_for", ["tensorrt", "onnxruntime"])
def test_a_float_grid_of_one_target_stays(trained_for):
    model = placed(weight=QuantDescriptor((4, 3), axis=0), target="tensorrt")
    retarget(model, trained_for)
    lower_bits(model, 4)
    found = {}
    for target in ("tensorrt", "onnxruntime"):
        retarget(model, target)
        found[target] = model[1].weight_quantizer.num_bits
    assert found == {"tensorrt": (4, 3), "onnxruntime": 4}


def test_grids_of_fewer_bits_stay():
    model = network(Rule("1", weight=QuantDescriptor(3, axis=0)))
    lower_bits(model, 4)
    assert (bits(model)["1._weight"], bits(model)["1._input"]) == (3, 4)


def test_the_last_pattern_that_matches_decides():
    model = network()
    lower_bits(model, {"*": 4, "*_weight*": 2, "0.*": 8, "2.*": 6})
    found = {"0._input": 8, "0._weight": 8, "1._input": 4, "1._weight": 2, "2._input": 6, "2._weight": 6}
    assert bits(model) == found


def test_what_no_pattern_matches_stays():
    model = network()
    lower_bits(model, {"1.*": 4})
    assert bits(model)["0._weight"] == 8


def test_ranges_stay():
    model = network(Rule("1", weight=QuantDescriptor(8, axis=0, learn_amax="lsq"), input=QuantDescriptor(8, amax=3.0)))
    fakequant.calibrate(model, [torch.randn(8, 4)], progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower_bits(model, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].input_quantizer.amax == 3.0


def test_a_range_taken_after_it_is_that_of_a_layer_made_with_these_bits():
    layer = QuantLinear(40, 4)
    made = QuantLinear(40, 4, quant_desc_weight=QuantDescriptor(3, axis=0, narrow_range=True))
    made.load_state_dict(layer.state_dict())
    lower_bits(layer, 3)
    for each in (layer, made):
        reestimate_weights(each, "mse")
    assert torch.equal(layer.weight_quantizer.amax, made.weight_quantizer.amax)


@pytest.mark.parametrize("grid", [QuantDescriptor((4, 3)), QuantDescriptor(2, scheme="twn", axis=0)], ids=str)
def test_float_and_ternary_grids_stay(grid):
    model = network(Rule("1", weight=grid))
    lower_bits(model, 2)
    assert model[1].weight_quantizer.descriptor == grid


def test_a_papers_grid_has_the_bits_too():
    model = network(Rule("1", weight=QuantDescriptor(4, scheme="dorefa")))
    lower_bits(model, 2)
    assert len(model[1].weight_quantizer(torch.randn(20, 20)).unique()) == 4


@pytest.mark.parametrize("pattern", ["3.*", "conv*"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    model = network()
    with pytest.raises(InvalidValueError, match="patterns that match a quantizer on an integer grid, got '.*0._input"):
        lower_bits(model, {"*": 4, pattern: 8})
    assert set(bits(model).values()) == {8}


def test_a_model_without_integer_grids_is_refused():
    model = nn.Linear(2, 2)
    fakequant.quantize(model, "fp8")
    with pytest.raises(InvalidValueError, match="on integer grids, got no integer grid"):
        lower_bits(model, 4)


@pytest.mark.parametrize("num_bits", [1, 0, 17, -4])
def test_a_bad_number_is_refused(num_bits):
    with pytest.raises(InvalidValueError, match=r"num_bits\[.*\]: expected 2 to 16, got"):
        lower_bits(network(), num_bits)


@pytest.mark.parametrize("num_bits", [4.0, True, "4", (4, 3), None])
def test_what_is_no_number_is_refused(num_bits):
    with pytest.raises(InvalidTypeError, match=r"num_bits\['\*'\]: expected an int"):
        lower_bits(network(), num_bits)
