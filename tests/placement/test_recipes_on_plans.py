"""Recipes, in Python and in TOML, on plans: which rule decides, and what every error leaves behind."""

import pytest
import torch
from torch import nn

import fakequant as fq

FOUR_BITS = fq.QuantDescriptor(4)
FLOAT = {"input": None, "weight": None}


class Net(nn.Module):
    """A residual block, a pool, a small head; convolutions first and last of the block."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.bn, self.dropout = nn.BatchNorm2d(16), nn.Dropout()
        self.fc, self.head = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = self.b(self.a(x).relu()) + x
        return self.head(self.dropout(self.fc(x.mean((2, 3))).relu()))


LAYERS = ("stem", "a", "b", "fc", "head")


@pytest.fixture
def x():
    return torch.rand(2, 16, 8, 8)


@pytest.fixture
def planned(x):
    def plan(*rules, base="int8", target="tensorrt", model=None):
        recipe = fq.preset(base)
        for rule in rules:
            recipe = recipe + rule
        found = fq.plan(Net().eval() if model is None else model, x, target, recipe)
        return {edge.name: edge for edge in found.report.edges}

    return plan


def bits(edges, *names):
    """Return bits of edges, None for float."""
    return [edges[name].descriptor.num_bits if edges[name].descriptor else None for name in names]


class TestPresets:
    @pytest.mark.parametrize(("base", "expected"), [("int8", [8, 8]), ("w4a8", [8, 4])])
    @pytest.mark.parametrize("layer", ["stem", "fc"])
    def test_layers(self, planned, base, expected, layer):
        assert bits(planned(base=base), f"{layer}.input", f"{layer}.weight") == expected

    @pytest.mark.parametrize("base", ["int8", "w4a8"])
    def test_ops_without_weight_have_8_bits(self, planned, base):
        assert bits(planned(base=base), "add_0.other", "mean_0.input") == [8, 8]

    def test_a_preset_by_name_is_the_preset(self, x):
        model = Net().eval()
        assert fq.plan(model, x, recipe="w4a8").report == fq.plan(model, x, recipe=fq.preset("w4a8")).report

    def test_an_empty_recipe_leaves_layers_float_and_says_so(self, x):
        edges = fq.plan(Net().eval(), x, recipe=fq.Recipe()).report.edges
        found = [edge for edge in edges if edge.name.endswith(".weight")]
        assert {(edge.descriptor, edge.reason) for edge in found} == {(None, "no rule of the recipe matches it")}


class TestByName:
    def test_a_layer(self, planned):
        edges = planned(fq.Rule("a", **FLOAT, reason="sensitive"))
        assert [(edges[f"a.{o}"].descriptor, edges[f"a.{o}"].reason) for o in ("input", "weight")] == [
            (None, "sensitive")
        ] * 2

    def test_no_other_layer(self, planned):
        assert bits(planned(fq.Rule("a", **FLOAT)), "stem.weight", "b.weight", "fc.weight") == [8, 8, 8]

    def test_a_pattern(self, planned):
        assert bits(planned(fq.Rule("[ab]", **FLOAT)), "stem.weight", "a.weight", "b.weight") == [8, None, None]

    def test_a_call_site(self, planned):
        edge = planned(fq.Rule("add_0", **FLOAT))["add_0.other"]
        assert (edge.descriptor, edge.reason) == (None, "rule 'add_0', type '*' leaves it float")

    def test_a_call_site_inside_a_module(self, x):
        model = nn.Sequential(Net()).eval()
        edges = {
            e.name: e for e in fq.plan(model, x, recipe=fq.preset("int8") + fq.Rule("*.add_0", **FLOAT)).report.edges
        }
        assert edges["0.add_0.other"].descriptor is None

    def test_another_grid_at_a_call_site(self, planned):
        assert bits(planned(fq.Rule("add_0", input=FOUR_BITS)), "add_0.input", "add_0.other") == [None, 4]

    def test_a_grid_of_the_input_alone(self, planned):
        assert bits(planned(fq.Rule("a", input=FOUR_BITS)), "a.input", "a.weight") == [4, 8]

    def test_a_float_input_alone(self, planned):
        assert bits(planned(fq.Rule("a", input=None)), "a.input", "a.weight") == [None, 8]

    def test_a_float_weight_alone(self, planned):
        assert bits(planned(fq.Rule("a", weight=None)), "a.input", "a.weight") == [8, None]

    def test_another_grid_ends_sharing(self, planned):
        assert planned(fq.Rule("add_0", input=FOUR_BITS))["add_0.other"].shares == ()

    def test_the_last_match_wins(self, planned):
        edges = planned(fq.Rule("a", **FLOAT), fq.Rule("[ab]", weight=FOUR_BITS), fq.Rule("b", **FLOAT))
        assert bits(edges, "a.weight", "b.weight") == [4, None]


class TestByType:
    @pytest.mark.parametrize(
        ("type_name", "edge"),
        [
            ("Conv2d", "a.weight"),
            ("Conv*", "stem.input"),
            ("Linear", "fc.weight"),
            ("add", "add_0.other"),
            ("mean", "mean_0.input"),
        ],
    )
    def test_float(self, planned, type_name, edge):
        assert planned(fq.Rule(type=type_name, **FLOAT))[edge].descriptor is None

    @pytest.mark.parametrize(
        ("type_name", "edge"), [("Conv2d", "fc.weight"), ("Linear", "a.weight"), ("add", "a.input")]
    )
    def test_other_types_stay_quantized(self, planned, type_name, edge):
        assert planned(fq.Rule(type=type_name, **FLOAT))[edge].descriptor is not None

    def test_a_function_goes_by_the_class_of_its_layer(self, x):
        class Function(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.rand(16, 16, 1, 1))

            def forward(self, x):
                return nn.functional.conv2d(x, self.w)

        edges = fq.plan(Function(), x, recipe=fq.preset("int8") + fq.Rule(type="Conv2d", **FLOAT)).report.edges
        assert [(edge.type, edge.descriptor) for edge in edges] == [("Conv2d", None)] * 2

    def test_name_and_type_have_to_match_both(self, planned):
        edges = planned(fq.Rule("[af]*", type="Linear", **FLOAT))
        assert bits(edges, "a.weight", "add_0.other", "fc.weight") == [8, 8, None]


class TestForce:
    def test_a_small_layer(self, planned):
        edge = planned(fq.Rule("head", force=True))["head.weight"]
        assert (edge.descriptor is not None, edge.reason) == (True, "rule 'head' asks for it")

    def test_the_branch_of_an_add(self, planned):
        assert bits(planned(fq.Rule("add_0", force=True)), "add_0.input", "add_0.other") == [8, 8]

    def test_what_was_quantized_anyway_keeps_its_reason(self, planned):
        assert planned(fq.Rule("add_0", force=True))["add_0.other"].reason == "skip of a residual add (R33)"

    @pytest.mark.parametrize("type_name", ["relu", "mean"])
    def test_an_op(self, planned, type_name):
        edges = planned(fq.Rule(type=type_name, force=True))
        assert {edge.descriptor is not None for edge in edges.values() if edge.type == type_name} == {True}

    def test_a_grid(self, planned):
        assert bits(planned(fq.Rule("head", weight=FOUR_BITS, force=True)), "head.weight") == [4]

    def test_float_is_stronger(self, planned):
        assert bits(planned(fq.Rule("a", force=True, **FLOAT)), "a.weight") == [None]

    def test_a_grid_without_it_is_refused(self, planned):
        edge = planned(fq.Rule("head", weight=FOUR_BITS))["head.weight"]
        assert (edge.descriptor, edge.reason) == (None, "32 inputs, 10 outputs: fewer than 16")

    def test_attention_keeps_the_range_of_its_probabilities(self):
        class Attention(nn.Module):
            def forward(self, x):
                return torch.softmax(x @ x.mT * 2, -1) @ x

        plan = fq.plan(Attention(), torch.rand(2, 8, 16), recipe=fq.Recipe() + fq.Rule(type="matmul", force=True))
        amaxes = {edge.name: edge.descriptor.amax for edge in plan.report.edges if edge.descriptor}
        names = [f"matmul_{n}.{operand}" for n in (0, 1) for operand in ("input", "other")]
        assert [amaxes[name] for name in names] == [None, None, 1.0, None]
        (probabilities,) = [slot for slot in plan.slots if slot.name == "matmul_1.input"]
        assert {grid.amax for grid in probabilities.grids.values()} == {1.0}

    def test_a_replaced_forward_is_stronger(self, planned):
        model = Net().eval()
        model.a.forward = model.a.forward
        assert planned(fq.Rule("a", force=True), model=model)["a.weight"].descriptor is None


class TestTarget:
    @pytest.mark.parametrize("target", ["tensorrt", "tensor*", "*", "[to]*"])
    def test_a_rule_about_it_counts(self, planned, target):
        assert bits(planned(fq.Rule("a", target=target, **FLOAT)), "a.weight") == [None]

    @pytest.mark.parametrize("target", ["onnxruntime", "*runtime"])
    def test_a_rule_about_others_does_not(self, planned, target):
        assert bits(planned(fq.Rule("a", target=target, **FLOAT)), "a.weight") == [8]

    @pytest.mark.parametrize("target", ["tensorrt-ep", "onnxruntime-cuda"])
    def test_a_rule_about_tensorrt_counts_for_targets_with_its_placement(self, planned, target):
        rules = fq.Rule("a", target="tensorrt", **FLOAT), fq.Rule("b", target="onnxruntime", **FLOAT)
        edges = planned(*rules, target=target)
        assert [bits(edges, f"{name}.weight") for name in "ab"] == [[None], [8]]

    @pytest.mark.parametrize("target", ["TensorRT", "rt", "", "tensorrt-ep", "onnxruntime-cuda"])
    def test_a_rule_about_no_placement_is_refused(self, target):
        with pytest.raises(
            fq.InvalidValueError, match=rf"Rule.target: .* \['onnxruntime', 'tensorrt'\], .* got '{target}'"
        ):
            fq.Rule("a", target=target)

    @pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
    def test_a_rule_about_one_that_matches_nothing_is_refused_for_all(self, planned, target):
        with pytest.raises(fq.RecipeError, match="rule name='nowhere'"):
            planned(fq.Rule("nowhere", target="onnxruntime"), target=target)

    def test_a_rule_about_another_may_match_what_only_that_quantizes(self, planned):
        assert planned(fq.Rule(type="relu", target="onnxruntime")) == planned()

    def test_unknown(self, x):
        with pytest.raises(
            fq.InvalidValueError, match=r"target: expected one of \['onnxruntime', .*'tensorrt-ep'\], got 'tpu'"
        ):
            fq.plan(Net(), x, "tpu")

    def test_unknown_for_quantize(self, x):
        with pytest.raises(fq.InvalidValueError, match="got 'tpu'"):
            fq.quantize(Net(), example_inputs=x, target="tpu")

    def test_unknown_without_an_example(self):
        with pytest.raises(fq.InvalidValueError, match="got 'tpu'"):
            fq.quantize(Net(), target="tpu")


class Branches(nn.Module):
    """Two ways in, one out by each of two heads."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.middle, self.one, self.two = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        y = self.middle(self.left(x).relu() * self.right(x))
        return self.one(y), self.two(y.relu())


class TestPosition:
    @pytest.mark.parametrize(("position", "layer"), [("first", "stem"), ("last", "head")])
    def test_of_a_chain(self, planned, position, layer):
        edges = planned(fq.Rule(position=position, input=FOUR_BITS, weight=FOUR_BITS, force=True))
        assert [name for name in LAYERS if bits(edges, f"{name}.weight") == [4]] == [layer]

    @pytest.mark.parametrize(("position", "layers"), [("first", ["left", "right"]), ("last", ["one", "two"])])
    def test_of_branches(self, position, layers):
        recipe = fq.preset("int8") + fq.Rule(position=position, **FLOAT)
        report = fq.plan(Branches(), torch.rand(4, 16), recipe=recipe).report
        assert [layer.name for layer in report.left_float] == layers

    @pytest.mark.parametrize("position", ["first", "last"])
    def test_a_single_layer_is_both(self, position):
        recipe = fq.preset("int8") + fq.Rule(position=position, **FLOAT)
        report = fq.plan(nn.Sequential(nn.Linear(16, 16)), torch.rand(4, 16), recipe=recipe).report
        assert len(report.left_float) == 1

    def test_ops_have_none(self, planned):
        edges = planned(fq.Rule(position="first", **FLOAT))
        assert bits(edges, "add_0.other", "mean_0.input") == [8, 8]

    def test_with_a_type_that_is_elsewhere(self, planned):
        with pytest.raises(fq.RecipeError, match="type='Linear' position='first': expected to match a layer"):
            planned(fq.Rule(type="Linear", position="first"))

    @pytest.mark.parametrize("position", ["middle", "First", "0"])
    def test_unknown(self, position):
        with pytest.raises(fq.InvalidValueError, match=rf"Rule.position: expected one of .*, got '{position}'"):
            fq.Rule(position=position)

    def test_without_an_example(self):
        with pytest.raises(fq.RecipeError, match=r"rule position='first': expected example_inputs, .*, got none"):
            fq.quantize(Net(), fq.preset("int8") + fq.Rule(position="first"))


class TestRuleThatMatchesNothing:
    @pytest.mark.parametrize(
        ("rule", "named"),
        [
            (fq.Rule("layer9"), r"rule name='layer9' type='\*'"),
            (fq.Rule(type="Conv3d"), r"rule name='\*' type='Conv3d'"),
            (fq.Rule("a", type="Linear"), "rule name='a' type='Linear'"),
            (fq.Rule("add_1"), r"rule name='add_1' type='\*'"),
            (fq.Rule("A"), r"rule name='A' type='\*'"),
            (fq.Rule(type="conv2d"), r"rule name='\*' type='conv2d'"),
        ],
        ids=["name", "type", "name and type", "call site", "case of a name", "case of a type"],
    )
    def test_is_named(self, planned, rule, named):
        with pytest.raises(fq.RecipeError, match=f"{named}: expected to match a layer, got none of"):
            planned(rule)

    def test_among_others(self, planned):
        with pytest.raises(fq.RecipeError, match="rule name='nowhere'"):
            planned(fq.Rule("a"), fq.Rule("nowhere"), fq.Rule("b"))


TOML = {
    "empty": ("", ()),
    "preset": ('preset = "int8"', ()),
    "name": ('[[rule]]\nname = "a"', (fq.Rule("a"),)),
    "float": ('[[rule]]\nname = "a"\nfloat = true', (fq.Rule("a", **FLOAT),)),
    "not float": ('[[rule]]\nname = "a"\nfloat = false', (fq.Rule("a"),)),
    "float by grid": ('[[rule]]\nname = "a"\ninput = "float"\nweight = "float"', (fq.Rule("a", **FLOAT),)),
    "float weight": ('[[rule]]\nname = "a"\nweight = "float"', (fq.Rule("a", weight=None),)),
    "default": ('[[rule]]\nname = "a"\ninput = "default"', (fq.Rule("a"),)),
    "reason": ('[[rule]]\nname = "a"\nfloat = true\nreason = "why"', (fq.Rule("a", **FLOAT, reason="why"),)),
    "type": ('[[rule]]\ntype = "add"\nfloat = true', (fq.Rule(type="add", **FLOAT),)),
    "force": ('[[rule]]\nname = "head"\nforce = true', (fq.Rule("head", force=True),)),
    "target": ('[[rule]]\nname = "b"\ntarget = "onnx*"', (fq.Rule("b", target="onnx*"),)),
    "position": ('[[rule]]\nposition = "last"\nfloat = true', (fq.Rule(position="last", **FLOAT),)),
    "grid": (
        '[[rule]]\nname = "a"\nweight = {num_bits = 4, axis = 0, narrow_range = true}',
        (fq.Rule("a", weight=fq.QuantDescriptor(4, axis=0, narrow_range=True)),),
    ),
    "grid in a section": (
        '[[rule]]\nname = "a"\n[rule.input]\nnum_bits = 4\nunsigned = true',
        (fq.Rule("a", input=fq.QuantDescriptor(4, unsigned=True)),),
    ),
    "two": ('[[rule]]\nname = "a"\nfloat = true\n[[rule]]\nname = "b"', (fq.Rule("a", **FLOAT), fq.Rule("b"))),
}


def recipe_of(rules):
    recipe = fq.preset("int8")
    for rule in rules:
        recipe = recipe + rule
    return recipe


@pytest.mark.parametrize(("text", "rules"), TOML.values(), ids=TOML)
class TestToml:
    def test_is_the_recipe_in_python(self, text, rules):
        assert fq.parse_recipe(text) == recipe_of(rules)

    def test_from_a_file(self, tmp_path, text, rules):
        file = tmp_path / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        assert fq.load_recipe(file) == fq.load_recipe(str(file)) == recipe_of(rules)

    def test_gives_the_same_plan(self, x, text, rules):
        model = Net().eval()
        assert (
            fq.plan(model, x, recipe=fq.parse_recipe(text)).report == fq.plan(model, x, recipe=recipe_of(rules)).report
        )


def test_toml_has_another_preset():
    assert fq.parse_recipe('preset = "w4a8"') == fq.preset("w4a8")


BAD = {
    "no TOML": ("preset =", "expected TOML, got "),
    "twice the key": ('preset = "int8"\npreset = "int8"', "expected TOML, got "),
    "unknown key": ("bits = 8", "expected the keys preset and rule, got bits"),
    "unknown keys": ("rules = []\nbits = 8", "expected the keys preset and rule, got bits, rules"),
    "unknown preset": ('preset = "int7"', r"recipe: expected one of .*'int8', 'w4a8'\], got 'int7'"),
    "preset is a number": ("preset = 8", "preset: expected a str, got 8"),
    "one table": ('[rule]\nname = "a"', r"rule: expected tables \[\[rule\]\], got something else"),
    "rule is a list": ('rule = ["a"]', r"rule: expected tables \[\[rule\]\], got something else"),
    "rule is a text": ('rule = "a"', r"rule: expected tables \[\[rule\]\], got something else"),
    "unknown field": ('[[rule]]\nnam = "a"', r"rule 1: expected keys among float, .*type, weight, got nam"),
    "unknown fields": ("[[rule]]\nz = 1\ny = 2", r"rule 1: expected keys among .*, got y, z"),
    "name": ("[[rule]]\nname = 3", "rule 1: Rule.name: expected a str, got 3"),
    "type": ('[[rule]]\ntype = ["add"]', r"rule 1: Rule.type: expected a str, got \['add'\]"),
    "reason": ("[[rule]]\nreason = true", "rule 1: Rule.reason: expected a str, got True"),
    "target": ("[[rule]]\ntarget = 8", "rule 1: Rule.target: expected a str, got 8"),
    "position": ('[[rule]]\nposition = "middle"', "rule 1: Rule.position: expected one of .*, got 'middle'"),
    "grid is a number": ("[[rule]]\nweight = 4", 'rule 1: weight: expected "default", "float" or a table .*, got 4'),
    "grid is a word": ('[[rule]]\ninput = "int8"', "rule 1: input: expected .*, got 'int8'"),
    "grid is a switch": ("[[rule]]\ninput = true", "rule 1: input: expected .*, got True"),
    "field of a grid": (
        "[[rule]]\ninput = {bits = 4}",
        r"rule 1: QuantDescriptor: expected keys among .*, got \['bits'\]",
    ),
    "bits out of range": ("[[rule]]\ninput = {num_bits = 40}", "rule 1: num_bits: expected 2 to 16 .*, got 40"),
    "bits as text": ('[[rule]]\ninput = {num_bits = "4"}', "rule 1: num_bits: expected an int .*, got '4'"),
    "the second rule": ('[[rule]]\nname = "a"\n[[rule]]\nnam = "b"', "rule 2: expected keys among"),
}
BAD_UNSEEN = {
    "preset is a list": 'preset = ["int8"]',
    "float is a text": '[[rule]]\nname = "a"\nfloat = "true"',
    "float is a number": '[[rule]]\nname = "a"\nfloat = 1',
    "force is a text": '[[rule]]\nname = "a"\nforce = "no"',
    "force is a number": '[[rule]]\nname = "a"\nforce = 0',
}


class TestBadToml:
    @pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
    def test_says_where(self, text, message):
        with pytest.raises(fq.RecipeError, match=f"^{message}"):
            fq.parse_recipe(text)

    @pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
    def test_a_file_is_named(self, tmp_path, text, message):
        file = tmp_path / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(fq.RecipeError, match=f"recipe.toml: {message}"):
            fq.load_recipe(file)

    @pytest.mark.parametrize("text", BAD_UNSEEN.values(), ids=BAD_UNSEEN)
    def test_wrong_types(self, text):
        with pytest.raises(fq.RecipeError):
            fq.parse_recipe(text)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(fq.RecipeError, match="none.toml: expected a TOML file, got .*No such file"):
            fq.load_recipe(tmp_path / "none.toml")

    def test_a_folder(self, tmp_path):
        with pytest.raises(fq.RecipeError, match="expected a TOML file, got"):
            fq.load_recipe(tmp_path)

    def test_no_text(self, tmp_path):
        file = tmp_path / "recipe.toml"
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(fq.RecipeError, match="recipe.toml: expected a TOML file, got .*utf-8"):
            fq.load_recipe(file)


class Failing(Net):
    """Its forward fails behind the first layers."""

    def forward(self, x):
        self.b(self.a(x)) + x
        raise RuntimeError("on purpose")


REAL = fq.QuantDescriptor(fake_quant=False)
ERRORS = {
    "unknown preset": (Net, fq.RecipeError, {"recipe": "int7"}),
    "no recipe": (Net, fq.InvalidTypeError, {"recipe": 8}),
    "rule that matches nothing": (Net, fq.RecipeError, {"recipe": fq.preset("int8") + fq.Rule("nowhere")}),
    "unknown target": (Net, fq.InvalidValueError, {"target": "tpu"}),
    "example of another kind": (Net, fq.InvalidTypeError, {"example_inputs": 3}),
    "example of another shape": (Net, RuntimeError, {"example_inputs": torch.rand(2, 3, 8, 8)}),
    "forward that fails": (Failing, RuntimeError, {}),
}
# Codes in place of values: no layer can compute with them.
BAD_GRIDS = {
    "weight": {"name": "fc", "weight": REAL},
    "input of a later layer": {"name": "fc", "input": REAL},
    "call site": {"name": "add_0", "input": REAL},
}


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(("network", "error", "options"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
class TestAnErrorLeavesTheModel:
    @pytest.fixture
    def model(self, network, training):
        return network().train(training)

    @pytest.fixture
    def fail(self, x, error, options):
        def quantize(model):
            with pytest.raises(error):
                fq.quantize(model, **{"example_inputs": x, **options})

        return quantize

    def test_with_its_parameters(self, model, fail):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fail(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_with_its_classes_and_children(self, model, fail):
        before = [(name, type(module)) for name, module in model.named_modules()]
        fail(model)
        assert [(name, type(module)) for name, module in model.named_modules()] == before

    def test_without_hooks_and_in_its_mode(self, model, fail, training):
        before = hooks(model)
        fail(model)
        assert (hooks(model), {module.training for module in model.modules()}) == (before, {training})


@pytest.mark.parametrize("rule", BAD_GRIDS.values(), ids=BAD_GRIDS)
def test_a_grid_that_no_layer_can_use_is_refused(x, rule):
    with pytest.raises(fq.InvalidValueError, match="fake_quant"):
        fq.quantize(Net().eval(), fq.preset("int8") + fq.Rule(**rule), example_inputs=x)


@pytest.mark.parametrize("failing", ["_own", "_hide_callees"])
def test_an_error_half_way_is_undone(x, monkeypatch, failing):
    from fakequant import install

    original = getattr(install._Installation, failing)

    def fail(*args):
        original(*args)
        raise RuntimeError("half way")

    monkeypatch.setattr(install._Installation, failing, fail)
    model = nn.Sequential(Net()).eval()
    before = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict()), hooks(model)
    with pytest.raises(RuntimeError, match="half way"):
        fq.quantize(model, example_inputs=x)
    after = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict()), hooks(model)
    assert after == before


@pytest.mark.parametrize("fields", [{"amax": 2.0}, {"axis": 1}, {"affine": True}], ids=str)
def test_grids_of_targets_that_cannot_share_a_range_are_refused(planned, fields):
    rules = (
        fq.Rule("a", input=fq.QuantDescriptor(8, amax=1.0, axis=None), target="tensorrt"),
        fq.Rule("a", input=fq.QuantDescriptor(8, **fields), target="onnxruntime"),
    )
    with pytest.raises(fq.RecipeError, match=r"a.input: expected grids with the same amax, .* for all targets"):
        planned(*rules)
