"""Custom ops (rule R48): registered by a user, quantized where the user says."""

import types

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.call_sites import custom, ops

REASON = "registered custom op (R48)"


@torch.library.custom_op("fakequant_placement_test::scale_rows", mutates_args=())
def scale_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


@torch.library.custom_op("fakequant_placement_test::affine", mutates_args=())
def affine(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * w * factor + b


@pytest.fixture(autouse=True)
def _tables_put_back():
    # Other modules hold the same dicts, so their contents are put back and not the dicts.
    tables = (ops._OPS, ops._OP_OF, ops.KIND_OF, custom.TRANSLATIONS)
    before = [dict(table) for table in tables]
    yield
    for table, contents in zip(tables, before, strict=True):
        table.clear()
        table.update(contents)


@pytest.fixture
def library():
    """An op that is declared and implemented without a Python wrapper."""
    made = torch.library.Library("fakequant_placement_test_library", "DEF")
    made.define("project(Tensor x, Tensor w) -> Tensor")
    made.impl("project", lambda x, w: x.matmul(w), "CPU")
    yield torch.ops.fakequant_placement_test_library
    made._destroy()


class Net(nn.Module):
    """Two parameters and a function of the module and its input."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.w, self.b = (nn.Parameter(torch.randn(shape or (16, 1))) for _ in range(2))

    def forward(self, x):
        return self.function(self, x)


@pytest.fixture
def x():
    return torch.randn(16, 5)


def edges(model, x, *rules):
    recipe = fq.preset("int8")
    for rule in rules:
        recipe = recipe + rule
    return {edge.name: edge for edge in fq.plan(model, x, recipe=recipe).report.edges}


def quantized(model, x, **options):
    fq.quantize(model.eval(), example_inputs=x, **options)
    fq.calibrate(model, [x], progress=False)
    return model


def rounded(tensor, axis=None, lowest=-128):
    """Quantize by hand; lowest is that of a weight or of an activation."""
    others = [dim for dim in range(tensor.dim()) if dim != axis]
    amax = tensor.detach().abs().amax(others, keepdim=True)
    scale = amax / 127
    return (tensor / scale).round().clamp(lowest, 127) * scale


def scaled(m, x):
    return scale_rows(x, m.w)


class TestPlan:
    def test_an_op_that_nobody_registered_is_left_alone(self, x):
        assert edges(Net(scaled), x) == {}

    def test_inputs_are_quantized(self, x):
        fq.register_op(scale_rows, inputs=("x",))
        edge = edges(Net(scaled), x)["scale_rows_0.x"]
        assert (edge.descriptor, edge.reason, edge.is_weight) == (fq.QuantDescriptor(8), REASON, False)

    def test_arguments_that_are_not_named_are_not(self, x):
        fq.register_op(scale_rows, inputs=("x",))
        assert "scale_rows_0.w" not in edges(Net(scaled), x)

    @pytest.mark.parametrize("axis", [0, 1, None])
    def test_weights_have_the_axis_that_is_given(self, x, axis):
        fq.register_op(scale_rows, inputs=("x",), weights={"w": axis})
        edge = edges(Net(scaled), x)["scale_rows_0.w"]
        assert (edge.descriptor, edge.is_weight) == (fq.QuantDescriptor(8, axis=axis, narrow_range=True), True)

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda x, w: scale_rows(x, w), id="what the decorator returned"),
            pytest.param(lambda x, w: torch.ops.fakequant_placement_test.scale_rows(x, w), id="packet"),
            pytest.param(lambda x, w: torch.ops.fakequant_placement_test.scale_rows.default(x, w), id="overload"),
            pytest.param(lambda x, w: scale_rows(x=x, w=w), id="by name"),
        ],
    )
    @pytest.mark.parametrize(
        "registered",
        [
            pytest.param(lambda: scale_rows, id="decorated"),
            pytest.param(lambda: torch.ops.fakequant_placement_test.scale_rows, id="registered packet"),
            pytest.param(lambda: torch.ops.fakequant_placement_test.scale_rows.default, id="registered overload"),
        ],
    )
    def test_whatever_way_it_is_registered_and_called(self, x, call, registered):
        fq.register_op(registered(), inputs=("x",), weights={"w": 0})
        assert list(edges(Net(lambda m, x: call(x, m.w)), x)) == ["scale_rows_0.x", "scale_rows_0.w"]

    def test_an_op_of_a_library(self, x, library):
        fq.register_op(library.project, inputs=("x",), weights={"w": 1})
        found = edges(Net(lambda m, x: library.project(x, m.w), 5, 7), x)
        assert [(name, edge.descriptor.axis) for name, edge in found.items()] == [
            ("project_0.x", None),
            ("project_0.w", 1),
        ]

    def test_an_input_shares_with_a_layer_that_reads_it(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(16))

            def forward(self, x):
                return self.fc(x), scale_rows(x, self.w)

        fq.register_op(scale_rows, inputs=("x",))
        assert edges(Both(), torch.rand(4, 16))["scale_rows_0.x"].shares == ("fc.input",)

    def test_two_calls_are_two_sites(self, x):
        fq.register_op(scale_rows, inputs=("x",))
        assert list(edges(Net(lambda m, x: scaled(m, scaled(m, x))), x)) == ["scale_rows_0.x", "scale_rows_1.x"]

    def test_an_average_before_it_is_quantized(self):
        fq.register_op(scale_rows, inputs=("x",))
        model = Net(lambda m, x: scale_rows(x.mean((2, 3)), m.w), 3)
        assert edges(model, torch.rand(2, 3, 8, 8))["mean_0.input"].descriptor is not None


class TestRules:
    @pytest.fixture(autouse=True)
    def registered(self):
        fq.register_op(scale_rows, inputs=("x",), weights={"w": 0})

    @pytest.mark.parametrize("rule", [{"name": "scale_rows_0"}, {"type": "scale_rows"}], ids=["name", "type"])
    def test_leave_it_float(self, x, rule):
        found = edges(Net(scaled), x, fq.Rule(**rule, input=None, weight=None, reason="why"))
        assert [(edge.descriptor, edge.reason) for edge in found.values()] == [(None, "why")] * 2

    def test_give_its_weight_another_grid(self, x):
        found = edges(Net(scaled), x, fq.Rule(type="scale_rows", weight=fq.QuantDescriptor(4, axis=0)))
        assert [edge.descriptor.num_bits for edge in found.values()] == [8, 4]

    def test_it_is_counted_in_the_report(self, x):
        assert "1 of 1 scale_rows quantized" in str(fq.plan(Net(scaled), x).report)


class TestForward:
    def test_is_that_of_rounded_operands(self, x):
        fq.register_op(scale_rows, inputs=("x",))
        model = quantized(Net(scaled), x)
        torch.testing.assert_close(model(x), rounded(x) * model.w, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("axis", [0, None])
    def test_with_a_weight(self, x, axis):
        fq.register_op(scale_rows, inputs=("x",), weights={"w": axis})
        model = quantized(Net(scaled), x)
        torch.testing.assert_close(model(x), rounded(x) * rounded(model.w, axis, lowest=-127), rtol=0, atol=1e-6)

    def test_with_a_matrix_of_channels_in_columns(self, x, library):
        fq.register_op(library.project, inputs=("x",), weights={"w": 1})
        model = quantized(Net(lambda m, x: library.project(x, m.w), 5, 7), x)
        torch.testing.assert_close(model(x), rounded(x) @ rounded(model.w, 1, lowest=-127), rtol=0, atol=1e-5)

    def test_with_an_argument_that_is_no_tensor(self, x):
        fq.register_op(affine, inputs=("x",), weights={"w": 0})
        model = quantized(Net(lambda m, x: affine(x, m.w, m.b, factor=3.0)), x)
        expected = rounded(x) * rounded(model.w, 0, lowest=-127) * 3 + model.b
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)

    def test_with_two_weights(self, x):
        fq.register_op(affine, inputs=("x",), weights={"w": 0, "b": 0})
        model = quantized(Net(lambda m, x: affine(x, m.w, m.b)), x)
        w, b = (rounded(weight, 0, lowest=-127) for weight in (model.w, model.b))
        torch.testing.assert_close(model(x), rounded(x) * w + b, rtol=0, atol=1e-5)

    def test_with_two_computed_weights(self, x):
        fq.register_op(affine, inputs=("x",), weights={"w": None, "b": None})
        model = quantized(Net(lambda m, x: affine(x, m.w * 1, m.b * 50)), x)
        amaxes = [model.get_submodule(f"_call_sites.affine_0.{name}").amax.item() for name in "wb"]
        assert amaxes == [model.w.abs().max().item(), (model.b * 50).abs().max().item()]

    @pytest.mark.parametrize("name", ["w", "b"])
    def test_the_method_for_weights_is_that_of_every_weight(self, x, name):
        fq.register_op(affine, inputs=("x",), weights={"w": None, "b": None})
        model = Net(lambda m, x: affine(x, m.w, m.b))
        fq.quantize(model, example_inputs=x)
        fq.calibrate(model, [x], "percentile", percentile=50, weight_method="max", progress=False)
        amax = model.get_submodule(f"_call_sites.affine_0.{name}").amax
        assert amax.item() == getattr(model, name).abs().max().item()

    def test_amax_of_a_weight_has_the_shape_of_its_axis(self, x):
        fq.register_op(scale_rows, inputs=("x",), weights={"w": 0})
        model = quantized(Net(scaled), x)
        assert torch.equal(model.get_submodule("_call_sites.scale_rows_0.w").amax, model.w.abs())

    def test_float_again(self, x):
        fq.register_op(scale_rows, inputs=("x",), weights={"w": 0})
        model = quantized(Net(scaled), x)
        fq.dequantize(model)
        assert torch.equal(model(x), x * model.w)


class TestErrors:
    def test_a_second_registration(self):
        fq.register_op(scale_rows, inputs=("x",))
        with pytest.raises(fq.InvalidValueError, match="expected a new name, got 'scale_rows', which is an op already"):
            fq.register_op(scale_rows, inputs=("w",))

    def test_the_first_registration_stands(self, x):
        fq.register_op(scale_rows, inputs=("x",))
        with pytest.raises(fq.InvalidValueError):
            fq.register_op(scale_rows, inputs=("w",), onnx=lambda x, w: x)
        assert list(edges(Net(scaled), x)) == ["scale_rows_0.x"]
        assert not set(custom.TRANSLATIONS) & {torch.ops.fakequant_placement_test.scale_rows.default}

    def test_the_name_of_an_op_of_torch(self):
        made = torch.library.Library("fakequant_placement_test_taken", "DEF")
        made.define("add(Tensor x) -> Tensor")
        with pytest.raises(fq.InvalidValueError, match="expected a new name, got 'add'"):
            fq.register_op(torch.ops.fakequant_placement_test_taken.add, inputs=("x",))
        made._destroy()

    @pytest.mark.parametrize(
        ("options", "unknown"),
        [
            ({"inputs": ("y",)}, "y"),
            ({"inputs": ("x", "y", "z")}, "y, z"),
            ({"inputs": ("x",), "weights": {"weight": 0}}, "weight"),
            ({"inputs": ("",)}, ""),
        ],
        ids=["input", "two", "weight", "empty"],
    )
    def test_no_such_argument(self, options, unknown):
        with pytest.raises(fq.InvalidValueError, match=rf"scale_rows: expected arguments among x, w, got {unknown}$"):
            fq.register_op(scale_rows, **options)

    def test_an_error_registers_nothing(self):
        with pytest.raises(fq.InvalidValueError):
            fq.register_op(scale_rows, inputs=("y",))
        fq.register_op(scale_rows, inputs=("x",))

    @pytest.mark.parametrize(
        "op",
        [torch.relu, nn.ReLU(), "mylib::op", None, types.SimpleNamespace()],
        ids=["function", "module", "name", "None", "object"],
    )
    def test_no_operator(self, op):
        with pytest.raises(fq.InvalidTypeError, match="op: expected an operator such as torch.ops.mylib.name, got"):
            fq.register_op(op, inputs=("x",))


class TestOnnx:
    def test_the_translation_is_kept_for_every_overload(self):
        def translation(x, w):
            return x

        fq.register_op(scale_rows, inputs=("x",), onnx=translation)
        assert custom.TRANSLATIONS[torch.ops.fakequant_placement_test.scale_rows.default] is translation

    def test_without_one_there_is_none(self):
        fq.register_op(scale_rows, inputs=("x",))
        assert torch.ops.fakequant_placement_test.scale_rows.default not in custom.TRANSLATIONS
