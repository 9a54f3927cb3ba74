"""Squeeze-and-excite and average pooling: rules R35 and R43 on gates, features and pools."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq

GATE_LAYER = "squeeze-and-excite gate: matrix-vector products on one pixel"
GATE = "gate of squeeze-and-excite"
FEATURE = "feature of squeeze-and-excite (R35)"
FLOAT_FEATURE = "the gated feature stays float (R35)"
NO_CONVOLUTION = "the feature does not come straight out of a quantized convolution (R35)"
POOLED = "average pooling whose output is quantized too (R35)"
FLOAT_POOL = "average pooling whose output stays float (R35)"


def edges(model, *inputs, recipe="int8"):
    return {edge.name: edge for edge in fq.plan(model.eval(), inputs, recipe=recipe).report.edges}


def conv(inputs=32, outputs=32, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Pixelwise(nn.Module):
    """As in MobileNetV3 and EfficientNet: 1x1 convolutions on the pooled pixel."""

    pool = "se.avgpool.input"

    def __init__(self, channels=32, scale=nn.Hardsigmoid, activation=nn.ReLU):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, channels, 1)
        self.activation, self.scale = activation(), scale()

    def gate(self, x):
        return self.scale(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x):
        return self.gate(x) * x


class FeatureFirst(Pixelwise):
    def forward(self, x):
        return x * self.gate(x)


class Multiplied(Pixelwise):
    def forward(self, x):
        return torch.mul(x, self.gate(x))


class Mean(Pixelwise):
    """As in timm: the mean over both axes."""

    pool = "se.mean_0.input"

    def gate(self, x):
        return torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Linear(nn.Module):
    """As in SENet: two linear layers."""

    pool = "se.avgpool.input"

    def __init__(self):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 32)

    def gate(self, x):
        return torch.sigmoid(self.fc2(F.relu(self.fc1(self.avgpool(x).flatten(1)))))

    def forward(self, x):
        return x * self.gate(x).view(-1, 32, 1, 1)


class Indexed(Linear):
    def forward(self, x):
        return x * self.gate(x)[:, :, None, None]


class Expanded(Linear):
    """To the letter: with expand_as."""

    def forward(self, x):
        return x * self.gate(x).view(-1, 32, 1, 1).expand_as(x)


class Block(nn.Module):
    """Expansion, activation, squeeze-and-excite, projection."""

    def __init__(self, se, activation=None, project=None):
        super().__init__()
        self.expand, self.bn = conv(16, 32), nn.BatchNorm2d(32)
        self.activation = nn.Hardswish() if activation is None else activation
        self.se = se
        self.project = conv(32, 16, 1) if project is None else project

    def forward(self, x):
        return self.project(self.se(self.activation(self.bn(self.expand(x)))))


GATES = [Pixelwise, FeatureFirst, Multiplied, Mean, Linear, Indexed]


@pytest.fixture
def x():
    return torch.rand(2, 16, 8, 8)


def operands(found):
    """Return the reasons of both operands of the gated product."""
    return {found["se.mul_0.input"].reason, found["se.mul_0.other"].reason}


@pytest.mark.parametrize("se", GATES)
class TestBlock:
    @pytest.mark.parametrize("layer", ["fc1", "fc2"])
    @pytest.mark.parametrize("operand", ["input", "weight"])
    def test_layers_of_the_gate_stay_float(self, x, se, layer, operand):
        edge = edges(Block(se()), x)[f"se.{layer}.{operand}"]
        assert (edge.descriptor, edge.reason) == (None, GATE_LAYER)

    def test_the_report_has_the_reason(self, x, se):
        left = {layer.name: layer.reason for layer in fq.plan(Block(se()).eval(), x).report.left_float}
        assert left == {"se.fc1": GATE_LAYER, "se.fc2": GATE_LAYER}

    def test_the_pool_stays_float(self, x, se):
        edge = edges(Block(se()), x)[se.pool]
        assert (edge.descriptor, edge.reason) == (None, FLOAT_POOL)

    def test_of_the_product_the_feature_is_quantized(self, x, se):
        found = edges(Block(se()), x)
        quantized = [
            found[f"se.mul_0.{side}"].reason for side in ("input", "other") if found[f"se.mul_0.{side}"].descriptor
        ]
        assert quantized == [FEATURE]

    def test_the_gate_is_not(self, x, se):
        assert operands(edges(Block(se()), x)) == {FEATURE, GATE}

    def test_layers_around_are_quantized(self, x, se):
        found = edges(Block(se()), x)
        assert all(found[f"{name}.input"].descriptor for name in ("expand", "project"))

    def test_without_a_layer_behind_the_feature_stays_float(self, x, se):
        assert operands(edges(Block(se(), project=nn.Identity()), x)) == {FLOAT_FEATURE, GATE}

    def test_with_a_float_op_behind_the_feature_stays_float(self, x, se):
        assert operands(edges(Block(se(), project=nn.Sequential(nn.Tanh(), conv())), x)) == {FLOAT_FEATURE, GATE}

    def test_a_move_behind_is_looked_through(self, x, se):
        found = edges(Block(se(), project=nn.Sequential(nn.MaxPool2d(2), conv())), x)
        assert operands(found) == {FEATURE, GATE}

    def test_a_feature_from_elsewhere_stays_float(self, x, se):
        assert operands(edges(Block(se(), activation=nn.GroupNorm(2, 32)), x)) == {NO_CONVOLUTION, GATE}

    def test_a_forced_layer_is_quantized(self, x, se):
        found = edges(Block(se()), x, recipe=fq.preset("int8") + fq.Rule("se.fc1", force=True))
        assert found["se.fc1.weight"].descriptor is not None


class TestActivationOfTheFeature:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Identity])
    def test_is_fused(self, x, activation):
        assert operands(edges(Block(Pixelwise(), activation()), x)) == {FEATURE, GATE}


class TestNoGate:
    def test_of_equal_shapes(self, x):
        class Product(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = conv(16, 32), conv(16, 32)

            def forward(self, x):
                return self.a(x) * self.b(x).sigmoid()

        found = edges(Product(), x)
        assert {found[f"mul_0.{side}"].reason for side in ("input", "other")} == {"pointwise, fused in float (R40)"}

    def test_not_of_an_average_the_layers_are_quantized(self, x):
        class Spatial(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = conv(16, 32)

            def forward(self, x):
                return x[:, :1] * self.a(x).sigmoid()

        assert edges(Spatial(), x)["a.input"].descriptor is not None

    @pytest.mark.parametrize("name", ["se.fc1.input", "se.fc2.weight", "se.avgpool.input"])
    def test_expanded_gates_are_gates(self, x, name):
        assert edges(Block(Expanded()), x)[name].descriptor is None


class Net(nn.Module):
    """Runs a function of itself; its children come by name."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def pooled_for_two(m, x):
    y = F.avg_pool2d(x, 2)
    return m.conv(y), m.down(y)


READ_QUANTIZED = {
    "convolution": (lambda m, x: m.conv(F.avg_pool2d(x, 2)), "avg_pool2d_0"),
    "linear behind flatten": (lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), "adaptive_avg_pool2d_0"),
    "linear behind dropout": (lambda m, x: m.fc(F.dropout(x.mean((2, 3)), 0.5, False)), "mean_0"),
    "two convolutions": (pooled_for_two, "avg_pool2d_0"),
    "another average": (lambda m, x: m.fc(F.avg_pool2d(x, 2).mean((2, 3))), "avg_pool2d_0"),
    "the last average": (lambda m, x: m.fc(F.avg_pool2d(x, 2).mean((2, 3))), "mean_0"),
    "cat": (lambda m, x: m.wide(torch.cat([F.avg_pool2d(x, 2), F.max_pool2d(x, 2)], 1)), "avg_pool2d_0"),
    "skip of an add": (lambda m, x: m.down(x) + F.avg_pool2d(x, 2), "avg_pool2d_0"),
}


def pooled_and_read_twice(m, x):
    y = F.avg_pool2d(x, 2)
    return m.conv(y), y.exp()


def pooled_and_returned(m, x):
    y = F.avg_pool2d(x, 2)
    return m.conv(y), y


READ_FLOAT = {
    "nobody": (lambda m, x: F.avg_pool2d(x, 2), "avg_pool2d_0"),
    "relu": (lambda m, x: m.conv(F.avg_pool2d(x, 2).relu()), "avg_pool2d_0"),
    "one of two": (pooled_and_read_twice, "avg_pool2d_0"),
    "also the user": (pooled_and_returned, "avg_pool2d_0"),
    "small layer": (lambda m, x: m.small(x.mean((2, 3))), "mean_0"),
    "branch of an add": (lambda m, x: F.avg_pool2d(x, 2) + F.max_pool2d(x, 2), "avg_pool2d_0"),
    "another float average": (lambda m, x: F.avg_pool2d(x, 2).mean((2, 3)), "avg_pool2d_0"),
}


def pools(function):
    return Net(
        function,
        conv=conv(16, 16),
        wide=conv(32, 16),
        down=nn.Conv2d(16, 16, 2, 2),
        fc=nn.Linear(16, 16),
        small=nn.Linear(16, 10),
    )


class TestAverage:
    @pytest.mark.parametrize(("function", "call"), READ_QUANTIZED.values(), ids=READ_QUANTIZED)
    def test_read_by_quantized_calls_only(self, x, function, call):
        edge = edges(pools(function), x)[f"{call}.input"]
        assert (edge.descriptor is not None, edge.reason) == (True, POOLED)

    @pytest.mark.parametrize(("function", "call"), READ_FLOAT.values(), ids=READ_FLOAT)
    def test_read_by_a_float_call(self, x, function, call):
        edge = edges(pools(function), x)[f"{call}.input"]
        assert (edge.descriptor, edge.reason) == (None, FLOAT_POOL)

    @pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4)])
    def test_module(self, x, pool):
        assert edges(nn.Sequential(pool, conv(16, 16)), x)["0.input"].reason == POOLED

    def test_read_by_a_bilinear_enlargement(self, x):
        model = nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), conv(16, 16))
        assert edges(model, x)["0.input"].descriptor is None

    def test_read_by_a_layer_that_a_rule_leaves_float(self, x):
        recipe = fq.preset("int8") + fq.Rule("fc", input=None, weight=None)
        assert edges(pools(lambda m, x: m.fc(x.mean((2, 3)))), x, recipe=recipe)["mean_0.input"].descriptor is None


def test_squeeze_and_excite_runs_with_one_rounded_operand(x):
    model = Block(Pixelwise()).eval()
    fq.quantize(model, example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    feature = model.activation(model.bn(model.expand(x)))
    rounded = model.se.get_submodule("_call_sites.mul_0.other")(feature)
    expected = model.project(rounded * model.se.gate(feature))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
