"""Rules R43 and R44: layers too small for integers, at the boundaries, with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq

WEIGHTED = "input of a weighted layer (R30)"


def edge(model, *inputs, name="layer.input", recipe="int8"):
    found = {edge.name: edge for edge in fq.plan(model.eval(), inputs, recipe=recipe).report.edges}
    return found[name]


def verdict(model, *inputs, **options):
    """Return whether the input of the layer is quantized, and why."""
    found = edge(model, *inputs, **options)
    return found.descriptor is not None, found.reason


class Layer(nn.Module):
    """One layer; with ``behind``, not the first that the input meets."""

    def __init__(self, layer, behind=False):
        super().__init__()
        self.layer, self.behind = layer, behind

    def forward(self, x):
        return self.layer(x.tanh() if self.behind else x)


def too_few(inputs, outputs):
    return f"{inputs} inputs, {outputs} outputs: fewer than 16"


class TestLinear:
    @pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (16, 1000), (1000, 16)])
    def test_quantized(self, inputs, outputs):
        assert verdict(Layer(nn.Linear(inputs, outputs)), torch.rand(4, inputs)) == (True, WEIGHTED)

    @pytest.mark.parametrize(("inputs", "outputs"), [(15, 16), (16, 15), (15, 15), (1, 16), (16, 2), (1000, 15)])
    def test_float(self, inputs, outputs):
        assert verdict(Layer(nn.Linear(inputs, outputs)), torch.rand(4, inputs)) == (False, too_few(inputs, outputs))

    @pytest.mark.parametrize("inputs", [16, 8, 1000])
    def test_one_output(self, inputs):
        assert verdict(Layer(nn.Linear(inputs, 1)), torch.rand(4, inputs)) == (False, "a matrix-vector product")

    @pytest.mark.parametrize("rows", [1, 2, 100])
    def test_the_batch_does_not_matter(self, rows):
        assert verdict(Layer(nn.Linear(16, 16)), torch.rand(rows, 16)) == (True, WEIGHTED)

    def test_neither_do_further_dimensions(self):
        assert verdict(Layer(nn.Linear(16, 16)), torch.rand(1, 2, 3, 16)) == (True, WEIGHTED)

    @pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (15, 16), (16, 15)])
    def test_the_weight_goes_with_the_input(self, inputs, outputs):
        quantized, reason = verdict(Layer(nn.Linear(inputs, outputs)), torch.rand(4, inputs), name="layer.weight")
        assert (quantized, reason) == (
            (True, "weight (R30)") if inputs == outputs else (False, too_few(inputs, outputs))
        )

    @pytest.mark.parametrize(("inputs", "outputs", "quantized"), [(16, 16, True), (15, 16, False), (16, 15, False)])
    def test_function(self, inputs, outputs, quantized):
        class Function(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.rand(outputs, inputs))

            def forward(self, x):
                return F.linear(x, self.w)

        assert verdict(Function(), torch.rand(4, inputs), name="linear_0.input")[0] is quantized


class Product(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x @ self.w


class TestProductWithAWeight:
    # The presets have rules for layers only; this one has a rule for products.
    recipe = fq.Recipe(defaults=(fq.Rule(),))

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((16, 16), (True, WEIGHTED)),
            ((15, 16), (False, too_few(15, 16))),
            ((16, 15), (False, too_few(16, 15))),
            ((16, 1), (False, "a matrix-vector product")),
            ((2, 16, 16), (False, "a batched weight has no channel axis")),
        ],
    )
    def test_boundary(self, shape, expected):
        x = torch.rand(2, 4, shape[-2])
        assert verdict(Product(*shape), x, name="matmul_0.input", recipe=self.recipe) == expected

    def test_presets_quantize_it(self):
        assert verdict(Product(16, 16), torch.rand(4, 16), name="matmul_0.input") == (True, WEIGHTED)

    @pytest.mark.parametrize("name", ["input", "other"])
    def test_of_two_activations_stays_float(self, name):
        class Two(nn.Module):
            def forward(self, x, y):
                return x @ y

        x = torch.rand(16, 16)
        expected = (False, "a product outside of a fused attention (R42)")
        assert verdict(Two(), x, x + 1, name=f"matmul_0.{name}") == expected


def small(inputs, outputs, *kernel):
    shape = "x".join(map(str, kernel))
    return f"{inputs} input channels a group, {outputs} outputs, kernel {shape}: too few for integer kernels"


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


@pytest.fixture
def image():
    return lambda channels: torch.rand(1, channels, 8, 8)


class TestConvolution:
    @pytest.mark.parametrize("behind", [False, True], ids=["first", "later"])
    @pytest.mark.parametrize(
        ("inputs", "outputs"),
        [
            pytest.param(16, 16, id="both 16"),
            pytest.param(16, 15, id="inputs multiple of 8 and at least 16"),
            pytest.param(15, 16, id="outputs multiple of 8 and at least 16"),
            pytest.param(16, 1, id="one output"),
            pytest.param(1, 16, id="one input"),
            pytest.param(8, 17, id="aligned inputs, enough outputs"),
            pytest.param(17, 8, id="enough inputs, aligned outputs"),
        ],
    )
    def test_quantized_wherever_it_stands(self, image, inputs, outputs, behind):
        assert verdict(Layer(conv(inputs, outputs), behind), image(inputs)) == (True, WEIGHTED)

    @pytest.mark.parametrize("behind", [False, True], ids=["first", "later"])
    @pytest.mark.parametrize(
        ("inputs", "outputs"),
        [
            pytest.param(15, 15, id="both 15"),
            pytest.param(17, 15, id="odd, one enough"),
            pytest.param(15, 17, id="odd, the other enough"),
            pytest.param(7, 7, id="few"),
            pytest.param(3, 4, id="color to few"),
        ],
    )
    def test_float_wherever_it_stands(self, image, inputs, outputs, behind):
        expected = (False, small(inputs, outputs, 3, 3))
        assert verdict(Layer(conv(inputs, outputs), behind), image(inputs)) == expected

    @pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (8, 3), (8, 8), (8, 15), (15, 8), (1, 8)])
    def test_fewer_than_16_aligned_only_as_the_first(self, image, inputs, outputs):
        verdicts = [verdict(Layer(conv(inputs, outputs), behind), image(inputs)) for behind in (False, True)]
        assert verdicts == [(True, WEIGHTED), (False, small(inputs, outputs, 3, 3))]

    @pytest.mark.parametrize("outputs", [8, 16, 32, 64])
    def test_the_first_layer_of_color_images(self, image, outputs):
        assert verdict(Layer(conv(3, outputs)), image(3)) == (True, WEIGHTED)

    @pytest.mark.parametrize("outputs", [7, 9, 12])
    def test_with_channels_that_are_no_multiple_of_8(self, image, outputs):
        assert verdict(Layer(conv(3, outputs)), image(3)) == (False, small(3, outputs, 3, 3))

    @pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (2, 3)])
    def test_the_exception_is_for_square_kernels(self, image, kernel):
        assert verdict(Layer(conv(3, 32, kernel)), image(3)) == (False, small(3, 32, *kernel))

    @pytest.mark.parametrize("kernel", [(1, 3), 1, 2, 5])
    def test_any_kernel_with_16_channels(self, image, kernel):
        assert verdict(Layer(conv(16, 16, kernel)), image(16)) == (True, WEIGHTED)

    @pytest.mark.parametrize(("channels", "quantized"), [(16, True), (15, False)])
    def test_three_dimensions(self, channels, quantized):
        assert verdict(Layer(nn.Conv3d(channels, channels, 3)), torch.rand(1, channels, 4, 4, 4))[0] is quantized

    @pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
    def test_one_dimension_is_float(self, layer):
        quantized, reason = verdict(Layer(layer(16, 16, 3)), torch.rand(1, 16, 8))
        assert not quantized
        assert "R15" in reason

    def test_without_a_batch(self):
        assert verdict(Layer(conv(15, 15)), torch.rand(15, 8, 8)) == (False, small(15, 15, 3, 3))


class TestGroups:
    @pytest.mark.parametrize("kernel", [3, 5, 7, (3, 5)])
    @pytest.mark.parametrize("channels", [8, 16, 24, 64])
    def test_depthwise(self, image, channels, kernel):
        layer = conv(channels, channels, kernel, groups=channels)
        assert verdict(Layer(layer, behind=True), image(channels)) == (True, WEIGHTED)

    @pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (1, 3), (2, 5)])
    def test_depthwise_with_a_small_kernel(self, image, kernel):
        layer = conv(32, 32, kernel, groups=32)
        assert verdict(Layer(layer), image(32)) == (False, small(1, 32, *kernel))

    @pytest.mark.parametrize("channels", [7, 12, 20])
    def test_depthwise_with_channels_that_are_no_multiple_of_8(self, image, channels):
        layer = conv(channels, channels, groups=channels)
        assert verdict(Layer(layer), image(channels)) == (False, small(1, channels, 3, 3))

    def test_only_the_outputs_have_to_be_a_multiple_of_8(self, image):
        assert verdict(Layer(conv(4, 8, groups=4)), image(4)) == (True, WEIGHTED)

    @pytest.mark.parametrize(("inputs", "quantized"), [(32, True), (30, False)])
    def test_channels_count_a_group(self, image, inputs, quantized):
        # 16 or 15 a group, with a kernel too small for the exception.
        assert verdict(Layer(conv(inputs, 20, 1, groups=2)), image(inputs))[0] is quantized

    def test_a_group_too_small(self, image):
        assert verdict(Layer(conv(30, 20, 1, groups=2)), image(30)) == (False, small(15, 20, 1, 1))


class TestTransposed:
    @pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (16, 15), (15, 16)])
    def test_quantized(self, image, inputs, outputs):
        layer = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        assert verdict(Layer(layer, behind=True), image(inputs)) == (True, WEIGHTED)

    @pytest.mark.parametrize(("inputs", "outputs"), [(15, 15), (17, 15), (15, 17)])
    def test_float(self, image, inputs, outputs):
        # Inputs and outputs in the order of the layer, not of its weight.
        layer = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        assert verdict(Layer(layer, behind=True), image(inputs)) == (False, small(inputs, outputs, 2, 2))

    def test_groups(self, image):
        layer = nn.ConvTranspose2d(16, 16, (2, 3), groups=16)
        assert verdict(Layer(layer), image(16)) == (False, small(1, 16, 2, 3))

    @pytest.mark.parametrize("shape", [(1, 16, 8, 8), (16, 8, 8)], ids=["batch", "no batch"])
    @pytest.mark.parametrize(("groups", "axis"), [(1, 1), (2, None)])
    def test_the_weight_has_a_range_for_each_channel_unless_in_groups(self, groups, axis, shape):
        recipe = fq.preset("int8") + fq.Rule("layer", force=True)
        layer = nn.ConvTranspose2d(16, 32, 2, groups=groups)
        assert edge(Layer(layer), torch.rand(shape), name="layer.weight", recipe=recipe).descriptor.axis == axis


class TestOtherReasons:
    def test_a_weight_computed_from_the_input(self):
        class Hyper(nn.Module):
            def forward(self, x, w):
                return F.linear(x, w)

        x = torch.rand(16, 16)
        assert verdict(Hyper(), x, x + 1, name="linear_0.input") == (False, "its weight is computed from the input")

    def test_a_weight_computed_from_parameters_is_quantized(self):
        class Scaled(Product):
            def forward(self, x):
                return F.linear(x, self.w * 2)

        assert verdict(Scaled(16, 16), torch.rand(4, 16), name="linear_0.input") == (True, WEIGHTED)

    @pytest.mark.parametrize(
        ("name", "function"), [("linear_0.input", F.linear), ("matmul_0.input", torch.matmul)], ids=["linear", "matmul"]
    )
    def test_constants_only(self, name, function):
        class Constant(Product):
            def forward(self, x):
                return x + function(torch.ones(4, 16), self.w)

        expected = (False, "computed from constants only")
        assert verdict(Constant(16, 16), torch.rand(4, 16), name=name) == expected

    def test_a_small_layer_is_in_the_report(self):
        report = fq.plan(Layer(nn.Linear(16, 10)), torch.rand(4, 16)).report
        assert [(layer.name, layer.reason) for layer in report.left_float] == [("layer", too_few(16, 10))]

    def test_a_forced_small_layer_is_quantized(self):
        recipe = fq.preset("int8") + fq.Rule("layer", force=True)
        expected = (True, "rule 'layer' asks for it")
        assert verdict(Layer(nn.Linear(16, 10)), torch.rand(4, 16), recipe=recipe) == expected

    def test_a_small_layer_keeps_its_class(self):
        model = Layer(nn.Linear(16, 10))
        fq.quantize(model, example_inputs=torch.rand(4, 16))
        assert type(model.layer) is nn.Linear
