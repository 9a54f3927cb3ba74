"""compare finds the layer at fault, names what computes it, and finds nothing in a right file."""

import copy
import functools
import importlib
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import CompareReport, Session
from fakequant.export.difference import Difference
from fakequant.export.graph import QUANTIZER_KEY, TARGET_KEY, constant_of

pytestmark = pytest.mark.slow

TARGETS = ("tensorrt", "onnxruntime")


def conv():
    return nn.Conv2d(16, 16, 3, padding=1)


class Block(nn.Module):
    """A residual block, so that its ops have a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + x)


class Residual(nn.Module):
    """Two blocks, [N, 16, H, W] to [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.fc = conv(), Block(), Block(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention, [N, L, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Repeated(nn.Module):
    """One layer, called several times, [N, L, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.a = 3, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = 2 * F.relu(self.a(x))
        return x


class Parallel(nn.Module):
    """Two layers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x)


class Flattening(nn.Module):
    """A shape that is computed from that of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(x.shape[0], -1))


class Gated(nn.Module):
    """A layer, a gate, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.b(self.a(x) * gate)


SMALL = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (Residual, IMAGE),
    "attention": (Attention, TOKENS),
    "called twice": (Repeated, TOKENS),
}


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Quantize with an example, calibrate, export for a target; once for each net and target."""

    @functools.cache
    def run(net: str, target: str):
        torch.manual_seed(0)
        build, x = NETS[net]
        model = build().eval()
        fq.quantize(model, example_inputs=x, target="tensorrt")
        fq.calibrate(model, [x], progress=False)
        path = tmp_path_factory.mktemp("placed") / "model.onnx"
        return model, path, fq.export_onnx(model, (x,), path, target=target), x

    return run


@pytest.fixture(scope="module")
def compared(placed):
    """Compare a right file as it is written; once for each net and target."""

    @functools.cache
    def run(net: str, target: str) -> CompareReport:
        model, path, _, x = placed(net, target)
        return fq.compare(model, path, x)

    return run


@pytest.fixture(scope="module")
def exported_linear(tmp_path_factory):
    torch.manual_seed(0)
    model, x = nn.Linear(16, 4).eval(), torch.randn(64, 16)
    fq.quantize(model)
    fq.calibrate(model, [x], progress=False)
    path = tmp_path_factory.mktemp("linear") / "linear.onnx"
    fq.export_onnx(model, (x,), path)
    return model, path, x


@pytest.fixture
def linear(tmp_path, exported_linear):
    """One quantized layer, its file, and its input, to be changed at will."""
    model, path, x = exported_linear
    return copy.deepcopy(model), Path(shutil.copy(path, tmp_path)), x


def changed(path, folder, change: Callable[[ir.Graph], None]):
    """Return the path of a changed copy of a file."""
    model = ir.load(path)
    change(model.graph)
    ir.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def scaled(name: str, factor: float) -> Callable[[ir.Graph], None]:
    """Change the scale of a quantizer."""

    def change(graph: ir.Graph) -> None:
        scale = graph.initializers[f"{name}.scale"]
        scale.const_value = ir.tensor(constant_of(scale) * np.float32(factor), name=scale.name)

    return change


def one_code(layer: str) -> Callable[[ir.Graph], None]:
    """Change one code of a weight, as far as it goes."""

    def change(graph: ir.Graph) -> None:
        (node,) = [n for n in graph if n.name == f"{layer}._weight_quantizer.DequantizeLinear"]
        codes = constant_of(node.inputs[0]).copy()
        first = (0,) * codes.ndim
        codes[first] = -127 if codes[first] > 0 else 127
        stored = node.inputs[0]
        stored.const_value = ir.tensor(codes, name=stored.name)

    return change


# A right file.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", NETS)
def test_a_right_file_has_no_divergence(compared, net, target):
    report = compared(net, target)
    assert report.first_divergence is None
    assert report.notes == ()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", NETS)
def test_a_right_file_runs_as_integers_within_two_steps(placed, net, target):
    model, path, _, x = placed(net, target)
    assert fq.compare(model, path, x, optimized=True, tolerance=2).first_divergence is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", NETS)
def test_every_activation_quantizer_is_a_layer_and_every_output(placed, compared, net, target):
    _, path, exported, _ = placed(net, target)
    report = compared(net, target)
    activations = {node for node in ir.load(path).graph if node.op_type == "QuantizeLinear"}
    names = {name for node in activations for name in node.metadata_props[QUANTIZER_KEY].split("\n")}
    assert {name for layer in report.layers for name in layer.quantizers} == names <= set(exported.quantizers)
    assert [layer.steps is None for layer in report.layers] == [False] * len(activations) + [True]


def test_calls_of_one_quantizer_are_layers_of_their_own(tmp_path, quantized):
    model, x = quantized(Repeated(), TOKENS), TOKENS[:1]
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fq.compare(model, tmp_path / "m.onnx", x)
    assert [layer.name for layer in report.layers[:3]] == [
        "a._input_quantizer",
        "a._input_quantizer (call 2)",
        "a._input_quantizer (call 3)",
    ]
    assert report.layers[2].sources == ("a._input_quantizer (call 2)",)
    assert report.first_divergence is None


def test_equal_quantizers_of_one_tensor_are_one_layer(tmp_path, quantized):
    model, x = Parallel(), torch.randn(4, 16)
    fq.export_onnx(quantized(model, x), (x,), tmp_path / "m.onnx")
    report = fq.compare(model, tmp_path / "m.onnx", x)
    (merged,) = (layer for layer in report.layers if layer.quantizers)
    assert merged.quantizers == ("q._input_quantizer", "k._input_quantizer")
    assert "q._input_quantizer (+1)  " in str(report)


@pytest.mark.parametrize("optimized", [False, True])
def test_optimizations_are_as_asked(placed, monkeypatch, optimized):
    asked = []

    def opened(path, **options):
        asked.append(options)
        return Session(path, **options)

    monkeypatch.setattr(importlib.import_module("fakequant.export.compare"), "Session", opened)
    model, path, _, x = placed("residual", "onnxruntime")
    fq.compare(model, path, x, optimized=optimized)
    assert asked == [{"provider": "cpu", "optimized": optimized}] * 2


def test_a_dynamic_batch(tmp_path, quantized):
    model = quantized(Flattening(), SMALL)
    batch = {0: torch.export.Dim("batch", min=2)}
    fq.export_onnx(model, (SMALL,), tmp_path / "m.onnx", dynamic_shapes=(batch,))
    report = fq.compare(model, tmp_path / "m.onnx", torch.randn(5, 16, 4, 4))
    assert report.first_divergence is None
    assert report.layers[1].sources == ("a._input_quantizer",), "the shape of the input is no source"


@pytest.mark.parametrize("as_batch", ["dict", "tuple"])
def test_batches_of_several_tensors(tmp_path, as_batch):
    model, x, gate = Gated().eval(), torch.randn(4, 16), torch.rand(4, 16)
    fq.quantize(model)
    fq.calibrate(model, [{"x": x, "gate": gate}], progress=False)
    fq.export_onnx(model, (x, gate), tmp_path / "m.onnx")
    if as_batch == "dict":
        report = fq.compare(model, tmp_path / "m.onnx", {"gate": gate, "x": x})
    else:
        report = fq.compare(model, tmp_path / "m.onnx", [gate, x], inputs=lambda batch: (batch[1], batch[0]))
    assert report.first_divergence is None
    assert [len(layer.sources) for layer in report.layers] == [1, 2, 1], "the gate is multiplied behind the quantizer"
    assert {layer.accumulated_sqnr_db > 100 for layer in report.layers} == {True}


def test_the_model_is_left_as_it_was(placed):
    model, path, _, x = placed("residual", "onnxruntime")
    model.train()
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    fq.compare(model, path, x)
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("quantizer"))
    model.eval()


# A fault is found where it is.

_FIRST, _SECOND = ("first._call_sites.add_0", "first"), ("second._call_sites.add_0", "second")
FAULTS = [
    (
        "tensorrt",
        scaled("stem._weight_quantizer", 1.5),
        "first.a._input_quantizer",
        ["stem"],
        ["stem._input_quantizer"],
    ),
    ("tensorrt", one_code("first.a"), "first.b._input_quantizer", ["first.a", "first"], ["first.a._input_quantizer"]),
    (
        "tensorrt",
        one_code("first.b"),
        "second.a._input_quantizer",
        ["first.b", *_FIRST],
        ["first.a._input_quantizer", "first.b._input_quantizer"],
    ),
    (
        "tensorrt",
        scaled("second.b._weight_quantizer", 1.2),
        "_call_sites.mean_0.input",
        ["second.b", *_SECOND],
        ["second.a._input_quantizer", "second.b._input_quantizer"],
    ),
    ("tensorrt", scaled("fc._weight_quantizer", 1.2), "linear", ["fc"], ["fc._input_quantizer"]),
    (
        "onnxruntime",
        one_code("first.b"),
        "first._call_sites.add_0.input",
        ["first.b"],
        ["first.b._input_quantizer"],
    ),
    (
        "onnxruntime",
        one_code("second.a"),
        "second.b._input_quantizer",
        ["second.a", "second"],
        ["second.a._input_quantizer"],
    ),
    ("onnxruntime", scaled("fc._weight_quantizer", 1.2), "linear", ["fc"], ["fc._input_quantizer"]),
]


@pytest.mark.parametrize(
    ("target", "change", "name", "modules", "sources"), FAULTS, ids=[f"{fault[0]}-{fault[2]}" for fault in FAULTS]
)
def test_a_fault_is_found_where_it_is(tmp_path, placed, target, change, name, modules, sources):
    model, path, _, x = placed("residual", target)
    report = fq.compare(model, changed(path, tmp_path, change), x)
    first = report.first_divergence
    assert (first.name, list(first.modules), list(first.sources)) == (name, modules, sources)
    assert report.divergences == (first,), "every other layer is right given equal inputs"
    behind = report.layers.index(first)
    assert all(layer.accumulated_sqnr_db == math.inf for layer in report.layers[:behind])
    assert all(layer.accumulated_sqnr_db < 50 for layer in report.layers[behind:])


def test_a_fault_of_the_second_call_is_found_there(tmp_path, placed):
    model, path, _, x = placed("called twice", "tensorrt")
    report = fq.compare(model, changed(path, tmp_path, scaled("a._input_quantizer.1", 1.1)), x)
    assert report.first_divergence.name == "a._input_quantizer.1"


def test_numbers_are_those_of_the_codes(tmp_path, linear):
    model, path, x = linear
    (layer, output) = fq.compare(model, changed(path, tmp_path, scaled("_input_quantizer", 1.1)), x).layers
    scale = model.input_quantizer.scale.numpy()
    right, wrong = (np.clip(np.rint(x.numpy() / s), -128, 127) for s in (scale, scale * np.float32(1.1)))
    error = np.abs(right - wrong)
    assert layer.steps == layer.accumulated_steps == error.max() > 1
    assert layer.moved == np.mean(error > 0)
    assert layer.sqnr_db == pytest.approx(10 * np.log10((right**2).sum() / (error**2).sum()))
    weight = model.weight_quantizer(model.weight).detach().numpy()
    y, equal, accumulated = (
        codes @ weight.T * s for codes, s in ((right, scale), (right, 1.1 * scale), (wrong, 1.1 * scale))
    )
    y, equal, accumulated = (one + model.bias.detach().numpy() for one in (y, equal, accumulated))
    assert output.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((y - equal) ** 2).sum()), abs=1e-3)
    assert output.accumulated_sqnr_db == pytest.approx(
        10 * np.log10((y**2).sum() / ((y - accumulated) ** 2).sum()), abs=1e-3
    )
    assert (output.steps, output.moved, output.accumulated_steps) == (None, None, None)


def test_the_tolerance_is_in_steps(tmp_path, linear):
    model, path, x = linear
    wrong = changed(path, tmp_path, scaled("_input_quantizer", 1.1))
    (steps, _) = (layer.steps for layer in fq.compare(model, wrong, x).layers)
    found = [fq.compare(model, wrong, x, tolerance=t).first_divergence.name for t in (steps - 1, steps)]
    assert found == ["_input_quantizer", "linear"], "the output has 50 dB whatever the tolerance"


# Files that do not say all of it.


def plain(model: nn.Module, x: Tensor, path) -> None:
    """Export as torch does by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)


def test_a_float_model_has_only_outputs(tmp_path):
    model, x = nn.Linear(16, 4), torch.randn(3, 16)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fq.compare(model, tmp_path / "m.onnx", x)
    assert [(layer.name, layer.sources, layer.steps) for layer in report.layers] == [("linear", ("input",), None)]
    assert report.first_divergence is None
    assert report.notes == ("Only the outputs are compared: the file quantizes no activation.",)


def test_a_file_without_the_names_of_quantizers_has_only_outputs(tmp_path, linear):
    model, _, x = linear
    plain(model, x, tmp_path / "m.onnx")
    report = fq.compare(model, tmp_path / "m.onnx", x)
    assert [layer.quantizers for layer in report.layers] == [()]
    assert report.first_divergence is None
    (note,) = report.notes
    assert note.startswith("Not compared: 1 of 1 QuantizeLinear do not name their quantizer")


def test_a_file_without_a_target_leaves_the_model_on_its_own(tmp_path, placed):
    model, _, _, x = placed("residual", "onnxruntime")
    fq.retarget(model, "onnxruntime")
    try:
        plain(model, x, tmp_path / "m.onnx")
        assert fq.compare(model, tmp_path / "m.onnx", x).layers[-1].sqnr_db > 100
    finally:
        fq.retarget(model, "tensorrt")


def test_another_grid_is_named(tmp_path, quantized):
    x = torch.randn(3, 16)
    model = quantized(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), x)
    model[1].input_quantizer.num_bits = (4, 3)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fq.compare(model, tmp_path / "m.onnx", x)
    assert [layer.name for layer in report.layers] == ["0._input_quantizer", "linear_1"]
    assert report.notes == (
        "Not compared, as their grid is not one of integers with one known scale: 1._input_quantizer.",
    )


def test_a_quantizer_that_is_not_in_the_file_is_named(tmp_path, quantized):
    x = torch.randn(3, 16)
    model = quantized(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), x)
    model[1].input_quantizer.disable()
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    model[1].input_quantizer.enable()
    report = fq.compare(model, tmp_path / "m.onnx", x)
    assert report.notes == ("In the model, but not in the file: 1._input_quantizer.",)
    assert report.first_divergence.name == "linear_1"


class Doubled(nn.Module):
    """Twice its input, in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).bfloat16()


def test_other_precisions_are_cast_and_compared(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 19]> g (float16[4] x) => (float16[4] y) { y = Add(x, x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    x = torch.tensor([1.0, 2.0, 4.0, -8.0])
    assert fq.compare(Doubled(), tmp_path / "m.onnx", x).layers[0].sqnr_db == math.inf


# The report.


def test_the_report_of_a_right_file(compared):
    report = compared("residual", "tensorrt")
    lines = str(report).splitlines()
    assert lines[0] == f"{report.path} on cpu, optimizations off, against torch:"
    assert len(lines) == 3 + 8 + 1
    assert re.fullmatch(
        r"  4  second\.a\._input_quantizer +0  0\.000% +inf +0 +inf  2 3 +first\.b, .*add_0, first", lines[6]
    )
    assert lines[-1].startswith("Every layer is within the tolerance (1 step at a quantizer, 50 dB at an output) given")
    assert re.search(r"accumulated, the outputs are at \d+\.\d dB\.$", lines[-1])


def test_columns_are_aligned(compared):
    lines = str(compared("residual", "tensorrt")).splitlines()
    end = lines[2].index("steps") + len("steps")
    assert {line[end - 1 : end + 1] for line in lines[3:10]} == {"0 "}
    assert lines[1].index("given equal inputs") > lines[2].index("quantizer or output")
    assert lines[1].index("accumulated") >= lines[2].index("SQNR") + len("SQNR")


def test_the_report_of_a_wrong_file_says_where(tmp_path, placed):
    model, path, _, x = placed("residual", "tensorrt")
    report = fq.compare(model, changed(path, tmp_path, one_code("first.b")), x)
    steps = report.first_divergence.steps
    lines = str(report).splitlines()
    assert [line for line in lines if line.startswith("!")] == [lines[6]]
    assert lines[-1] == (
        f"First beyond the tolerance (1 step at a quantizer, 50 dB at an output): second.a._input_quantizer: {steps} "
        "steps off, computed in first.b, first._call_sites.add_0, first from first.a._input_quantizer, "
        "first.b._input_quantizer."
    )


def test_another_range_in_the_model_is_said(linear):
    model, path, x = linear
    model.input_quantizer.amax = 2 * model.input_quantizer.amax
    report = fq.compare(model, path, x)
    assert str(report).endswith(
        f"its scale is {model.input_quantizer.scale / 2:.6g} in the file and {model.input_quantizer.scale:.6g} in "
        "the model. Marked ! as well: 1 more."
    )


# What cannot be compared.


def test_another_model_lacks_the_quantizers(placed):
    _, path, _, x = placed("residual", "tensorrt")
    with pytest.raises(
        fq.ValidationError, match=r"expected quantizers that the model has, got stem\._input_quantizer, .*fc"
    ) as caught:
        fq.compare(nn.Flatten(), path, x)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("Is this the model that was exported?")


def test_a_model_that_does_not_call_a_quantizer(tmp_path, quantized):
    model, x = quantized(Repeated(), TOKENS), TOKENS
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    model.times = 2
    with pytest.raises(fq.ValidationError, match=r"call every quantizer .* got no a\._input_quantizer \(call 3\)\. Is"):
        fq.compare(model, tmp_path / "m.onnx", x)


def test_a_disabled_quantizer(linear):
    model, path, x = linear
    model.input_quantizer.disable()
    with pytest.raises(fq.ValidationError, match="_input_quantizer: expected it calibrated and enabled as in the file"):
        fq.compare(model, path, x)


def test_a_model_with_other_outputs(linear, quantized):
    _, path, x = linear
    with pytest.raises(fq.ValidationError, match=r"linear\.onnx: expected outputs of shapes \[\(64, 5\)\] as in torch"):
        fq.compare(quantized(nn.Linear(16, 5), x), path, x)


class Skipping(nn.Module):
    """A layer of all tokens but the first ones, then a mean that hides how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped, self.a = 0, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, self.skipped :]).mean(1)


@pytest.mark.parametrize("how", ["compare", "validate_onnx"])
def test_a_model_with_other_shapes_inside(tmp_path, quantized, how):
    model, path = quantized(Skipping(), TOKENS), tmp_path / "m.onnx"
    fq.export_onnx(model, (TOKENS,), path, dynamic_shapes=({1: torch.export.Dim("tokens", min=2)},))
    model.skipped = 1
    with pytest.raises(
        fq.ValidationError, match=r"m\.onnx: a\._input_quantizer: expected outputs .*\(2, 23, 32\).*24, 32"
    ):
        fq.compare(model, path, TOKENS) if how == "compare" else fq.validate_onnx(path, model, [TOKENS])


def test_a_wrong_batch_names_the_file(linear):
    model, path, x = linear
    with pytest.raises(
        fq.ValidationError, match=rf"^{re.escape(str(path))}: expected inputs .*\[64, 16\].* got .*\(3, 16\)"
    ):
        fq.compare(model, path, x[:3])


def test_a_batch_of_another_kind(linear):
    model, path, x = linear
    with pytest.raises(fq.InvalidTypeError, match=r"Pass inputs=lambda batch: \(\.\.\.\)"):
        fq.compare(model, path, (x, x, x))


def test_arguments_in_the_order_of_validate_onnx(linear):
    model, path, x = linear
    with pytest.raises(fq.InvalidTypeError, match=r"model: expected an nn\.Module, got PosixPath"):
        fq.compare(path, model, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1}, "tolerance: expected a number of steps from 0 on, got -1"),
        ({"provider": "tpu"}, "provider: expected one of .*, got 'tpu'"),
    ],
)
def test_options_that_are_not_there(linear, options, message):
    model, path, x = linear
    with pytest.raises(fq.InvalidValueError, match=message):
        fq.compare(model, path, x, **options)


def _truncated(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _of_the_future(path) -> None:
    model = ir.load(path)
    model.opset_imports[""] = 99
    ir.save(model, path)


def _reaching_out(path) -> None:
    model = ir.load(path)
    ir.save(model, path, external_data="m.data", size_threshold_bytes=0)
    (path.parent / "m.data").rename(path.parent.parent / "m.data")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    path.write_bytes(proto.SerializeToString())


def _for_a_toaster(path) -> None:
    model = ir.load(path)
    model.metadata_props[TARGET_KEY] = "toaster"
    ir.save(model, path)


BAD_FILES = {
    "missing": (lambda path: path.unlink(), "expected an ONNX file, got nothing there"),
    "text": (lambda path: path.write_text("hello"), "expected an ONNX file, got something else"),
    "truncated": (_truncated, "expected an ONNX file, got something else or a part of one"),
    "opset": (_of_the_future, "expected opset 1 to .*, got 99"),
    "external data": (_reaching_out, "expected a file in the folder of the model, got '../m.data'"),
    "target": (_for_a_toaster, "target: expected one of .*, got 'toaster' in its metadata"),
}


@pytest.mark.parametrize("how", ["compare", "validate_onnx"])
@pytest.mark.parametrize("spoil", BAD_FILES)
def test_bad_files_are_refused(linear, spoil, how):
    model, path, x = linear
    change, message = BAD_FILES[spoil]
    change(path)
    with pytest.raises(fq.ValidationError, match=f"^{re.escape(str(path))}: .*{message}"):
        fq.compare(model, path, x) if how == "compare" else fq.validate_onnx(path, model, [x])


# The numbers.


@pytest.mark.parametrize(
    ("expected", "got", "largest", "sqnr"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0, math.inf),
        ([3.0, 4.0], [3.0, 4.5], 0.5, 20.0),
        ([3.0, 4.0, math.inf, math.nan], [3.0, 4.5, math.inf, math.nan], 0.5, 20.0),
        ([3.0, 4.0], [3.0, math.nan], math.inf, -math.inf),
        ([math.nan, 4.0], [3.0, 4.0], math.inf, -math.inf),
        ([-math.inf, 4.0], [math.inf, 4.0], math.inf, -math.inf),
        ([0.0, 0.0], [0.0, 1e-9], 1e-9, -math.inf),
        ([], [], 0.0, math.inf),
        (5.0, 5.5, 0.5, 20.0),
    ],
)
def test_differences(expected, got, largest, sqnr):
    found = Difference()
    found.add(np.array(expected), np.array(got))
    assert (found.largest, found.sqnr_db) == (largest, pytest.approx(sqnr))


def test_differences_add_up():
    found = Difference()
    for expected, got in (([3, 4], [3, 4]), ([5], [4]), ([0], [0])):
        found.add(np.array(expected, dtype=np.int8), np.array(got, dtype=np.int8))
    assert (found.largest, found.share, found.signal, found.noise) == (1.0, 0.25, 50.0, 1.0)
