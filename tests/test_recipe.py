import dataclasses

import pytest
from torch import nn

import fakequant
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError, RecipeError
from fakequant.presets import preset
from fakequant.recipe import Grid, Recipe, Rule

FLOAT = Rule(input=None, weight=None)
FOUR_BITS = Rule(weight=QuantDescriptor(4))

WEIGHTED = [*(f"Conv{d}d" for d in (1, 2, 3)), *(f"ConvTranspose{d}d" for d in (1, 2, 3)), "Linear"]
NOT_WEIGHTED = ["MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "InstanceNorm2d", "LSTM"]


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Rule(), True),
        (Rule("layer4.0.conv1"), True),
        (Rule("layer4.*"), True),
        (Rule("*conv?"), True),
        (Rule("layer4"), False),
        (Rule("LAYER4.*"), False),
        (Rule(type="Conv2d"), True),
        (Rule(type="Conv*"), True),
        (Rule(type="conv*"), False),
        (Rule(type="Conv1d"), False),
        (Rule("layer4.*", "Conv*"), True),
        (Rule("layer4.*", "Linear"), False),
        (Rule("fc", "Conv*"), False),
    ],
    ids=lambda value: f"{value.name}:{value.type}" if isinstance(value, Rule) else str(value),
)
def test_rule_matches_by_name_and_type(rule, matches):
    assert rule.matches("layer4.0.conv1", "Conv2d") is matches


@pytest.mark.parametrize(
    ("fields", "is_float"),
    [
        ({}, False),
        ({"input": None}, False),
        ({"weight": None}, False),
        ({"input": None, "weight": None}, True),
        ({"input": None, "weight": QuantDescriptor(8)}, False),
    ],
    ids=["default", "weight only", "input only", "neither", "weight grid"],
)
def test_rule_is_float_if_it_quantizes_nothing(fields, is_float):
    assert Rule(**fields).is_float is is_float


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", 3), ("type", nn.Linear), ("reason", None), ("input", 8), ("weight", "int8"), ("weight", False)],
    ids=lambda value: repr(value),
)
def test_rule_refuses_a_field_of_another_type(field, value):
    with pytest.raises(InvalidTypeError, match=rf"Rule\.{field}: expected .*, got"):
        Rule(**{field: value})


def test_rule_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule().name = "fc"


def test_reason_is_the_one_given():
    assert Rule(input=None, weight=None, reason="sensitive").why_float() == "sensitive"


def test_reason_otherwise_is_the_rule():
    assert Rule("fc", "Lin*", None, None).why_float() == "rule 'fc', type 'Lin*' leaves it float"


@pytest.mark.parametrize(
    ("rules", "decision"),
    [((FLOAT, FOUR_BITS), FOUR_BITS), ((FOUR_BITS, FLOAT), FLOAT)],
    ids=["float then 4 bits", "4 bits then float"],
)
def test_last_match_wins(rules, decision):
    assert Recipe(rules=rules).decide("fc", "Linear") is decision


def test_added_rule_wins_over_the_defaults():
    assert (preset("int8") + FLOAT).decide("fc", "Linear") is FLOAT


def test_rule_that_does_not_match_decides_nothing():
    other = Rule("other", input=None, weight=None)
    assert Recipe(rules=(FOUR_BITS, other)).decide("fc", "Linear") is FOUR_BITS


def test_layer_without_a_rule_stays_float_and_says_so():
    assert Recipe().decide("fc", "Linear").why_float() == "no rule of the recipe matches it"


def test_adding_leaves_the_recipe_alone():
    recipe = preset("int8")
    recipe + FLOAT
    assert recipe == preset("int8")


def test_only_a_rule_can_be_added():
    with pytest.raises(TypeError):
        preset("int8") + "fc"


@pytest.mark.parametrize("name", ["int8", "w4a8"])
@pytest.mark.parametrize("type_name", WEIGHTED)
def test_presets_quantize(name, type_name):
    assert not preset(name).decide("x", type_name).is_float


@pytest.mark.parametrize("name", ["int8", "w4a8"])
@pytest.mark.parametrize("type_name", NOT_WEIGHTED)
def test_presets_leave_alone(name, type_name):
    assert preset(name).decide("x", type_name).is_float


@pytest.mark.parametrize(("name", "bits"), [("int8", (8, 8)), ("w4a8", (8, 4))])
def test_presets_grids(name, bits):
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 1))
    fakequant.quantize(model, name)
    assert (model[0].input_quantizer.num_bits, model[0].weight_quantizer.num_bits) == bits


def test_w4a8_keeps_the_axis_and_the_narrow_range():
    weight = preset("w4a8").decide("x", "ConvTranspose2d").weight
    assert weight == QuantDescriptor(4, axis=1, narrow_range=True)


def test_unknown_preset_is_an_error():
    names = "'dynamic', 'dynamic-lstm', 'dynamic-per-token', 'fp8', 'int4', 'int8', 'w4a8'"
    with pytest.raises(RecipeError, match=rf"recipe: expected one of \[{names}\], got 'int3'"):
        preset("int3")


@pytest.mark.parametrize("name", ["dynamic", "dynamic-per-token"])
@pytest.mark.parametrize("type_name", [*(name for name in WEIGHTED if "Transpose" not in name), "matmul", "mm"])
def test_dynamic_presets_need_no_range(name, type_name):
    rule = preset(name).decide("x", type_name)
    assert (rule.input.dynamic, rule.weight.dynamic) == (True, True)


@pytest.mark.parametrize(("type_name", "axis"), [("Linear", "tokens"), ("matmul", "tokens"), ("Conv2d", None)])
def test_tokens_are_of_linear_layers(type_name, axis):
    assert preset("dynamic-per-token").decide("x", type_name).input.axis == axis


@pytest.mark.parametrize(("type_name", "axis"), [("Linear", 1), ("matmul", 0)])
def test_int4_blocks_lie_along_the_axis_that_is_summed_up(type_name, axis):
    rule = preset("int4").decide("x", type_name)
    assert (rule.input, rule.weight) == (
        None,
        QuantDescriptor(4, block_size=128, block_axis=axis, dynamic=True),
    )


@pytest.mark.parametrize(("name", "type_name"), [("int4", "Conv2d"), ("dynamic", "ConvTranspose2d")])
def test_presets_that_leave_layers_float(name, type_name):
    assert preset(name).decide("x", type_name).is_float


def test_fp8_is_on_ops_too():
    rule = preset("fp8").decide_op("x", "add")
    assert (rule.input.num_bits, preset("fp8").decide("x", "Conv2d").weight.axis) == ((4, 3), 0)


@pytest.mark.parametrize("name", ["dynamic", "int4"])
def test_ops_are_left_alone_by_what_is_about_layers_only(name):
    assert preset(name).decide_op("x", "add").is_float


def test_rule_that_matches_no_layer_is_named():
    with pytest.raises(RecipeError, match=r"rule name='fx' type='\*': expected to match a layer, got none of 2: a, b"):
        (preset("int8") + Rule("a") + Rule("fx")).check_matches({"a": "Linear", "b": "Conv2d"})


def test_long_list_of_layers_is_cut():
    with pytest.raises(RecipeError, match=r"got none of 20: l0, l1, l2, l3, l4, l5, l6, l7 \.\.\."):
        Recipe(rules=(Rule("fx"),)).check_matches({f"l{i}": "Linear" for i in range(20)})


def test_default_that_matches_no_layer_is_fine():
    preset("int8").check_matches({"a": "Linear"})


def test_default_grid_is_looked_up_in_the_class():
    assert (Rule().input, Rule().weight) == (Grid.DEFAULT, Grid.DEFAULT)


@pytest.mark.parametrize("scheme", ["twn", "xnor", "dorefa"])
def test_a_scheme_for_weights_is_refused_for_inputs(scheme):
    with pytest.raises(InvalidValueError, match=f"Rule.input: expected a grid for inputs, got scheme '{scheme}'"):
        Rule(input=QuantDescriptor(1 if scheme == "xnor" else 2, scheme=scheme))
