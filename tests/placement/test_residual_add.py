"""Rule R33: of a residual add, only the branch that is not fused into a convolution is quantized."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq

FUSED = "fused into the convolution before it (R33)"
SKIP = "skip of a residual add (R33)"
NO_CONVOLUTION = "no operand comes straight out of a quantized convolution: float on both sides (R35)"
BROADCAST = "the operands are broadcast: no residual add"


class Net(nn.Module):
    """Runs a function of itself; its children come by name."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def conv(inputs=16, outputs=16, kernel=3, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


@pytest.fixture
def x():
    return torch.rand(2, 16, 8, 8)


def edges(model, *inputs, recipe="int8"):
    return {edge.name: edge for edge in fq.plan(model.eval(), inputs, recipe=recipe).report.edges}


def sides(model, *inputs, add="add_0", **options):
    """Return the reasons of both operands of an add; True in front of those that are quantized."""
    found = edges(model, *inputs, **options)
    return [
        (found[f"{add}.{operand}"].descriptor is not None, found[f"{add}.{operand}"].reason)
        for operand in ("input", "other")
    ]


def add_in_place(a, b):
    a += b
    return a


SPELLINGS = [
    pytest.param(lambda a, b: a + b, id="+"),
    pytest.param(add_in_place, id="+="),
    pytest.param(torch.add, id="torch.add"),
    pytest.param(operator.add, id="operator.add"),
    pytest.param(lambda a, b: a.add(b), id="x.add"),
    pytest.param(lambda a, b: a.add_(b), id="x.add_"),
    pytest.param(lambda a, b: torch.add(input=a, other=b), id="keywords"),
    pytest.param(lambda a, b: torch.add(a, b, alpha=2), id="alpha"),
]


class TestIdentitySkip:
    @pytest.mark.parametrize("add", SPELLINGS)
    def test_branch_first(self, x, add):
        model = Net(lambda m, x: add(m.b(m.a(x).relu()), x), a=conv(), b=conv())
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]

    @pytest.mark.parametrize("add", SPELLINGS)
    def test_skip_first(self, x, add):
        # A clone, because += writes into the skip, which the convolution has read before.
        model = Net(lambda m, x: add(x.clone(), m.b(m.a(x).relu())), a=conv(), b=conv())
        assert sides(model, x) == [(True, SKIP), (False, FUSED)]

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_in_any_dimension(self, dimensions):
        layer = getattr(nn, f"Conv{dimensions}d")(16, 16, 3, padding=1)
        model = Net(lambda m, x: m.a(x) + x, a=layer)
        assert sides(model, torch.rand(1, 16, *[4] * dimensions)) == [(False, FUSED), (True, SKIP)]

    def test_transposed_convolution(self, x):
        model = Net(lambda m, x: m.a(x) + x, a=nn.ConvTranspose2d(16, 16, 3, padding=1))
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]

    def test_functional_convolution(self, x):
        model = Net(lambda m, x: F.conv2d(x, m.a.weight, padding=1) + x, a=conv())
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]

    def test_skip_from_a_layer_that_is_no_convolution(self, x):
        model = Net(lambda m, x: m.a(x) + x.exp(), a=conv())
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]


BETWEEN = {
    "batch norm": nn.BatchNorm2d(16),
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "bn, relu6": nn.Sequential(nn.BatchNorm2d(16), nn.ReLU6()),
    "bn, relu": nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
    "bn, silu": nn.Sequential(nn.BatchNorm2d(16), nn.SiLU()),
    "bn, hardswish": nn.Sequential(nn.BatchNorm2d(16), nn.Hardswish()),
    "dropout": nn.Dropout(),
    "x * sigmoid(x)": Net(lambda m, x: x * torch.sigmoid(x)),
    "sigmoid(x) * x": Net(lambda m, x: torch.sigmoid(x) * x),
    "clamp": Net(lambda m, x: x.clamp(0, 6)),
}
NOT_FUSED = {
    "max pool": nn.MaxPool2d(3, 1, 1),
    "group norm": nn.GroupNorm(2, 16),
    "softmax": nn.Softmax(1),
    "exp": Net(lambda m, x: x.exp()),
    "x * sigmoid(another)": Net(lambda m, x: x * torch.sigmoid(x + 1)),
    "flip": Net(lambda m, x: x.flip(3)),
}


class TestBetweenConvolutionAndAdd:
    @pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
    def test_is_fused(self, x, between):
        model = Net(lambda m, x: m.between(m.a(x)) + x, a=conv(), between=between)
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]

    @pytest.mark.parametrize("between", NOT_FUSED.values(), ids=NOT_FUSED)
    def test_is_not_fused(self, x, between):
        model = Net(lambda m, x: m.between(m.a(x)) + x, a=conv(), between=between)
        assert sides(model, x) == [(False, NO_CONVOLUTION)] * 2


def two_branches(deep_first):
    def forward(m, x):
        deep, shallow = m.b(m.a(x).relu()), m.down(x)
        return deep + shallow if deep_first else shallow + deep

    return Net(forward, a=conv(stride=2), b=conv(), down=conv(kernel=1, stride=2))


class TestTwoConvolutions:
    @pytest.mark.parametrize(("deep_first", "skip"), [(True, "other"), (False, "input")])
    def test_the_shorter_branch_is_quantized(self, x, deep_first, skip):
        found = edges(two_branches(deep_first), x)
        assert found[f"add_0.{skip}"].reason == SKIP

    @pytest.mark.parametrize(("deep_first", "branch"), [(True, "input"), (False, "other")])
    def test_the_longer_branch_stays_float(self, x, deep_first, branch):
        found = edges(two_branches(deep_first), x)
        assert found[f"add_0.{branch}"].descriptor is None

    def test_the_first_of_equally_long_ones_stays_float(self, x):
        model = Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv())
        assert sides(model, x) == [(False, FUSED), (True, SKIP)]

    @pytest.mark.parametrize("deep_first", [True, False])
    def test_length_counts_from_the_nearest_common_ancestor(self, x, deep_first):
        # The shallow branch also joins a long way from the model's input that the deep one does not take.
        def forward(m, x):
            y = m.stem(x)
            deep, shallow = m.b(m.a(y).relu()), m.down(torch.cat([y, m.long(x)], 1))
            return deep + shallow if deep_first else shallow + deep

        long = nn.Sequential(*[conv() for _ in range(8)])
        model = Net(forward, stem=conv(), a=conv(), b=conv(), down=conv(32, 16, 1), long=long)
        assert [quantized for quantized, _ in sides(model, x)] == [not deep_first, deep_first]

    @pytest.mark.parametrize("deep_first", [True, False])
    def test_length_is_that_of_the_longest_way(self, x, deep_first):
        # The deep branch has a short cut inside, which is shorter than the shallow branch.
        def forward(m, x):
            y = m.stem(x)
            deep, shallow = m.c(m.b(m.a(y).relu()) + y), m.e(m.d(y).relu())
            return deep + shallow if deep_first else shallow + deep

        model = Net(forward, stem=conv(), **{name: conv() for name in "abcde"})
        assert [quantized for quantized, _ in sides(model, x, add="add_1")] == [not deep_first, deep_first]

    def test_branches_of_different_inputs(self, x):
        model = Net(lambda m, x, y: m.a(x) + m.b(y), a=conv(), b=conv())
        assert sides(model, x, x + 1) == [(False, FUSED), (True, SKIP)]

    def test_the_skip_has_a_quantizer_of_its_own(self, x):
        assert edges(two_branches(True), x)["add_0.other"].shares == ()


class TestNoResidualAdd:
    @pytest.mark.parametrize(
        "function",
        [
            pytest.param(lambda m, x: x + x.exp(), id="no layer"),
            pytest.param(lambda m, x: m.fc(x) + x, id="linear"),
            pytest.param(lambda m, x: x + x, id="twice the same"),
        ],
    )
    def test_without_a_convolution_both_sides_stay_float(self, function):
        assert sides(Net(function, fc=nn.Linear(16, 16)), torch.rand(4, 16)) == [(False, NO_CONVOLUTION)] * 2

    def test_a_convolution_added_to_itself(self, x):
        def forward(m, x):
            y = m.a(x)
            return y + y

        assert sides(Net(forward, a=conv()), x) == [(False, NO_CONVOLUTION)] * 2

    @pytest.mark.parametrize(
        "function",
        [
            pytest.param(lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), id="other"),
            pytest.param(lambda m, x: x.mean((2, 3), keepdim=True) + m.a(x), id="input"),
            pytest.param(lambda m, x: m.a(x) + x[0], id="fewer dimensions"),
        ],
    )
    def test_broadcast(self, x, function):
        assert sides(Net(function, a=conv()), x) == [(False, BROADCAST)] * 2

    @pytest.mark.parametrize(
        "function",
        [
            pytest.param(lambda m, x: m.a(x) + 1, id="number"),
            pytest.param(lambda m, x: m.a(x) + m.a.bias[:, None, None], id="parameter"),
            pytest.param(lambda m, x: m.a(x) + torch.ones(16, 8, 8), id="constant"),
        ],
    )
    def test_something_constant_is_added(self, x, function):
        edge = edges(Net(function, a=conv()), x)["add_0.input"]
        assert (edge.descriptor, edge.reason) == (None, "no residual add of two activations")

    def test_a_difference_stays_float(self, x):
        assert not any(quantized for quantized, _ in sides(Net(lambda m, x: m.a(x) - x, a=conv()), x, add="sub_0"))


def read_twice(m, x):
    y = m.a(x)
    return y + x, m.b(y)


def read_twice_inside(m, x):
    y = m.a(x)
    return y.relu() + x, m.b(y)


def returned_too(m, x):
    y = m.a(x)
    return y + x, y


class TestSeveralReaders:
    @pytest.mark.parametrize("function", [read_twice, read_twice_inside, returned_too])
    def test_a_convolution_that_others_read_is_not_fused(self, x, function):
        assert sides(Net(function, a=conv(), b=conv()), x) == [(False, NO_CONVOLUTION)] * 2

    def test_with_one_such_the_other_is_fused(self, x):
        def forward(m, x):
            y = m.a(x)
            return y + m.b(y)

        assert sides(Net(forward, a=conv(), b=conv()), x) == [(True, SKIP), (False, FUSED)]


class TestFloatConvolution:
    def test_too_small(self, x):
        small = torch.rand(1, 7, 8, 8)
        assert sides(Net(lambda m, x: m.a(x) + x, a=conv(7, 7)), small) == [(False, NO_CONVOLUTION)] * 2

    def test_with_a_small_one_the_other_is_fused(self):
        model = Net(lambda m, x: m.small(x) + m.a(m.widen(x)), small=conv(7, 7), widen=conv(7, 16), a=conv(16, 7))
        # 16 to 7 channels fits integers (16 is a multiple of 8), 7 to 7 does not.
        assert sides(model, torch.rand(1, 7, 8, 8)) == [(True, SKIP), (False, FUSED)]

    def test_a_rule_leaves_it_float(self, x):
        recipe = fq.preset("int8") + fq.Rule("a", input=None, weight=None)
        found = edges(Net(lambda m, x: m.a(x) + x, a=conv()), x, recipe=recipe)
        assert found["add_0.other"].descriptor is None

    def test_a_rule_leaves_the_longer_branch_float(self, x):
        recipe = fq.preset("int8") + fq.Rule("b", input=None, weight=None)
        assert [q for q, _ in sides(two_branches(True), x, recipe=recipe)] == [True, False]

    def test_a_rule_forces_a_small_one(self):
        recipe = fq.preset("int8") + fq.Rule("a", force=True)
        found = edges(Net(lambda m, x: m.a(x) + x, a=conv(7, 7)), torch.rand(1, 7, 8, 8), recipe=recipe)
        assert found["add_0.other"].descriptor is not None


def chain(m, x):
    for block in (m.a, m.b, m.c):
        x = block(x) + x
    return x


class TestChain:
    @pytest.mark.parametrize("number", range(3))
    def test_every_skip_is_quantized(self, x, number):
        model = Net(chain, a=conv(), b=conv(), c=conv())
        assert sides(model, x, add=f"add_{number}") == [(False, FUSED), (True, SKIP)]

    @pytest.mark.parametrize(("number", "block"), [(0, "a"), (1, "b"), (2, "c")])
    def test_every_skip_shares_with_the_input_of_its_block(self, x, number, block):
        assert edges(Net(chain, a=conv(), b=conv(), c=conv()), x)[f"add_{number}.other"].shares == (f"{block}.input",)

    @pytest.mark.parametrize(
        "function", [lambda m, x: m.a(x) + x + m.b(x), lambda m, x: m.a(x) + (m.b(x) + x)], ids=["left", "right"]
    )
    def test_a_sum_of_three_has_one_fused_branch_an_add(self, x, function):
        found = edges(Net(function, a=conv(), b=conv()), x)
        reasons = [[found[f"add_{n}.{operand}"].reason for operand in ("input", "other")] for n in (0, 1)]
        assert [sorted(pair) for pair in reasons] == [[FUSED, SKIP]] * 2


class TestQuantizedModel:
    def test_skip_and_block_have_one_quantizer(self, x):
        model = Net(lambda m, x: m.b(m.a(x).relu()) + x, a=conv(), b=conv()).eval()
        fq.quantize(model, example_inputs=x)
        assert model.get_submodule("_call_sites.add_0.other") is model.a.input_quantizer

    def test_a_downsampling_skip_has_another(self, x):
        model = two_branches(True).eval()
        fq.quantize(model, example_inputs=x)
        quantizers = {id(model.get_submodule(n)) for n in ("_call_sites.add_0.other", "a._input_quantizer")}
        assert len(quantizers) == 2

    def test_the_fused_branch_has_none(self, x):
        model = Net(lambda m, x: m.a(x) + x, a=conv()).eval()
        fq.quantize(model, example_inputs=x)
        site = model.get_submodule("_call_sites.add_0")
        assert site.in_use == [site.other]

    def test_an_add_that_stays_float_is_no_site(self, x):
        model = Net(lambda m, x: m.a(x.exp() + x), a=conv()).eval()
        fq.quantize(model, example_inputs=x)
        assert not hasattr(model, "_call_sites")

    def test_the_sum_is_of_the_branch_and_the_rounded_skip(self, x):
        model = Net(lambda m, x: m.a(x) + x, a=conv()).eval()
        fq.quantize(model, example_inputs=x)
        fq.calibrate(model, [x], progress=False)
        rounded = model.a.input_quantizer(x)
        expected = F.conv2d(rounded, model.a.weight_quantizer(model.a.weight), model.a.bias, padding=1) + rounded
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
