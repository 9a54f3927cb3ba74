"""What export_onnx refuses, and that a refusal leaves nothing behind."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import fakequant as fq

D = fq.QuantDescriptor


@pytest.fixture
def linear(quantized) -> nn.Module:
    return quantized(nn.Linear(4, 4), torch.randn(3, 4))


ARGS = (torch.zeros(3, 4),)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target": "tpu"},
            fq.InvalidValueError,
            r"target: expected one of .*'onnxruntime-cuda', 'tensorrt', 'tensorrt-ep'\], got 'tpu'",
        ),
        ({"weights": "int4"}, fq.InvalidValueError, "weights: expected 'int8' or 'float', got 'int4'"),
        ({"opset": 12}, fq.InvalidValueError, "opset: expected 13 to 21, got 12"),
        ({"opset": 22}, fq.InvalidValueError, "opset: expected 13 to 21, got 22"),
        ({"dynamic_shapes": ({7: torch.export.Dim("batch")},)}, fq.ExportError, "expected axes of input with shape"),
    ],
    ids=["target", "weights", "old-opset", "new-opset", "dynamic-shapes"],
)
def test_a_bad_option(tmp_path, linear, options, error, message):
    with pytest.raises(error, match=message):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_args_that_are_no_tuple(tmp_path, linear):
    with pytest.raises(fq.InvalidTypeError, match="args: expected a tuple of example inputs, got Tensor"):
        fq.export_onnx(linear, torch.zeros(3, 4), tmp_path / "m.onnx")


def test_a_model_that_is_no_module(tmp_path):
    with pytest.raises(fq.InvalidTypeError, match=r"model: expected an nn\.Module, got function"):
        fq.export_onnx(lambda x: x, ARGS, tmp_path / "m.onnx")


def test_a_missing_folder(tmp_path, linear):
    with pytest.raises(fq.ExportError, match="path: expected a file in an existing folder"):
        fq.export_onnx(linear, ARGS, tmp_path / "none" / "m.onnx")


def test_a_folder_in_place_of_a_file(tmp_path, linear):
    with pytest.raises(fq.ExportError, match="path: expected a file in an existing folder"):
        fq.export_onnx(linear, ARGS, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_is_named(tmp_path, linear, value):
    linear.input_quantizer.amax.fill_(value)
    with pytest.raises(fq.ExportError, match="expected finite ranges, got NaN or Inf in _input_quantizer"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")


def test_every_uncalibrated_quantizer_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fq.quantize(model)
    model[0].weight_quantizer.amax = torch.ones(4, 1)
    with pytest.raises(fq.ExportError) as error:
        fq.export_onnx(model, ARGS, tmp_path / "m.onnx")
    missing = "0._input_quantizer, 1._input_quantizer, 1._weight_quantizer"
    assert f"3 of 4 quantizers are not calibrated: {missing}. Call fakequant.calibrate" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_quantizer_that_still_collects(tmp_path, linear):
    linear.input_quantizer.enable_calib()
    with pytest.raises(fq.ExportError, match=r"call disable_calib\(\) on _input_quantizer"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")


def test_a_quantizer_that_returns_codes(tmp_path, linear):
    linear.input_quantizer.descriptor = D(fake_quant=False)
    with pytest.raises(fq.ExportError, match="fake_quant=True, got codes from _input_quantizer"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("bits", "given", "needed"), [(16, 19, 21), (9, 20, 21), ((4, 3), 18, 19)], ids=["16", "9", "fp8"]
)
def test_an_opset_without_the_type_of_the_codes(tmp_path, quantized, bits, given, needed):
    model = quantized(nn.Linear(4, 4), *ARGS, recipe=fq.Recipe() + fq.Rule(input=D(bits)))
    with pytest.raises(fq.ExportError, match=f"opset: expected {needed} or later, got {given}, for _input_quantizer"):
        fq.export_onnx(model, ARGS, tmp_path / "m.onnx", target="onnxruntime", opset=given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_weights_that_are_not_float32(tmp_path, linear, dtype):
    with pytest.raises(fq.ExportError, match=rf"expected float32 weights, got weight \({dtype}\).*model\.float\(\)"):
        fq.export_onnx(linear.to(dtype), (torch.zeros(3, 4, dtype=dtype),), tmp_path / "m.onnx")


def test_a_half_model_is_exported_once_it_is_float(tmp_path, linear):
    fq.export_onnx(linear.half().float(), ARGS, tmp_path / "m.onnx")
    assert fq.validate_onnx(tmp_path / "m.onnx", linear, ARGS).simulated.max_steps == 0


class Untraceable(nn.Module):
    """Fails when it is exported, unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.fails = nn.Linear(4, 4), nn.BatchNorm1d(4), True

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
            raise ValueError("cannot be traced")
        return self.norm(self.layer(x))


def looks(model: nn.Module) -> dict[str, list]:
    """Return what an export must leave as it was."""
    modules = list(model.modules())
    return {
        "modes": [module.training for module in modules],
        "classes": [type(module) for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "state": [(name, value.tolist()) for name, value in model.state_dict().items()],
        "gradients": [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "descriptors": [module.descriptor for module in modules if isinstance(module, fq.TensorQuantizer)],
        "random numbers": torch.get_rng_state().tolist(),
    }


def untraceable() -> nn.Module:
    """Return a quantized model with gradients, in training mode but for one module."""
    model = Untraceable()
    fq.quantize(model)
    fq.calibrate(model, [torch.randn(3, 4)], progress=False)
    model.train()
    model.norm.eval()
    model(torch.randn(3, 4)).sum().backward()
    return model


LOOKS = ["modes", "classes", "attributes", "hooks", "state", "gradients", "descriptors", "random numbers"]
STAGES = {
    "forward": None,
    "trace": "torch.onnx.export",
    "name": "fakequant.export.rules.name_nodes.NameNodes.call",
    "optimize": "onnxscript.optimizer.optimize",
    "expand": "fakequant.export.rules.expand_quantizers.ExpandQuantizers.call",
    "rewrite": "fakequant.export.rules.merge_quantizers.MergeQuantizers.call",
    "save": "onnx_ir.save",
    "check": "onnx.checker.check_model",
    "rename": "pathlib.Path.replace",
}


@pytest.fixture(scope="module", params=[(stage, opset) for stage in STAGES for opset in (17, 18)], ids=str)
def failed(request, tmp_path_factory):
    """Return how a model looked before and after an export that failed, and the folder, with an older file."""
    (stage, opset), folder = request.param, tmp_path_factory.mktemp("failed")
    model = untraceable()
    model.fails = stage == "forward"
    (folder / "m.onnx").write_bytes(b"old")
    (folder / "m.onnx.data").write_bytes(b"old data")
    before = looks(model)

    def fail(*_, **__) -> None:
        raise OSError("cannot be done")

    with pytest.MonkeyPatch.context() as patch:
        if STAGES[stage] is not None:
            patch.setattr(STAGES[stage], fail)
        with pytest.raises(Exception, match="cannot be (traced|done)"):
            fq.export_onnx(model, ARGS, folder / "m.onnx", opset=opset)
    return before, looks(model), folder


@pytest.mark.parametrize("look", LOOKS)
def test_a_failed_export_leaves_the_model(failed, look):
    before, after, _ = failed
    assert after[look] == before[look]


def test_a_failed_export_leaves_the_files_that_were_there(failed):
    assert {file.name: file.read_bytes() for file in failed[2].iterdir()} == {
        "m.onnx": b"old",
        "m.onnx.data": b"old data",
    }


def test_a_failed_export_says_why(tmp_path):
    with pytest.raises(fq.ExportError, match="torch.onnx.export failed for Untraceable: (.|\n)*cannot be traced"):
        fq.export_onnx(untraceable(), ARGS, tmp_path / "m.onnx")


@pytest.fixture(scope="module", params=[17, 18])
def succeeded(request, tmp_path_factory):
    """Return how a model looked before and after its export."""
    model = untraceable()
    model.fails = False
    before = looks(model)
    fq.export_onnx(model, ARGS, tmp_path_factory.mktemp("succeeded") / "m.onnx", opset=request.param)
    return before, looks(model)


@pytest.mark.parametrize("look", LOOKS)
def test_an_export_leaves_the_model(succeeded, look):
    before, after = succeeded
    assert after[look] == before[look]


def test_two_kept_axes(tmp_path):
    recipe = fq.Recipe() + fq.Rule(weight=D(axis=(0, 1)), input=D(amax=1.0))
    model = nn.Linear(4, 4)
    fq.quantize(model, recipe)
    fq.calibrate(model, ARGS, progress=False)
    with pytest.raises(fq.ExportError, match=r"_weight_quantizer: scale: expected one axis .*, got shape \(4, 4\)"):
        fq.export_onnx(model, ARGS, tmp_path / "m.onnx")


def test_an_export_in_training_mode_is_of_the_evaluating_model(tmp_path, fresh_cnn):
    model, x = fresh_cnn
    model.train()
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert model.training
    assert model.bn1.training
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.sqnr_db >= 50


def test_an_existing_file_is_replaced(tmp_path, linear):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    fq.export_onnx(linear, ARGS, path)
    assert fq.validate_onnx(path, linear, ARGS).simulated.max_steps == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_graph_that_the_checker_refuses_is_not_written(tmp_path, linear, monkeypatch):
    def refuse(*_, **__) -> None:
        raise onnx.checker.ValidationError("wrong")

    monkeypatch.setattr("onnx.checker.check_model", refuse)
    with pytest.raises(fq.ExportError, match="the exported graph is not valid ONNX: wrong"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_export_error(tmp_path, linear, monkeypatch):
    def fill(model, path, **_) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", fill)
    with pytest.raises(fq.ExportError, match=r"m\.onnx: expected to write a file, got: .*No space left"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_limit(monkeypatch):
    """Let files have their data beside them from 10 bytes on."""
    monkeypatch.setattr("fakequant.export.write._EXTERNAL_DATA_ABOVE", 10)


def test_a_large_model_has_its_data_beside_it(tmp_path, linear, small_limit):
    report = fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.size == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert fq.validate_onnx(tmp_path / "m.onnx", linear, ARGS).simulated.max_steps == 0


def test_data_of_an_earlier_file_is_removed(tmp_path, linear, small_limit, monkeypatch):
    fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", opset=17)
    monkeypatch.undo()
    fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", opset=17)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_graph_never_meets_the_data_of_another(tmp_path, linear, small_limit, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    seen = []

    def replace(self, target, replace=Path.replace):
        files = {file.name: file.read_bytes() == b"old" for file in tmp_path.iterdir() if file.is_file()}
        seen.append((files.get("m.onnx"), files["m.onnx.data"]))
        return replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", replace)
    fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", opset=17)
    # Is the graph old, are the data? Before each step, and after the last neither is.
    assert seen == [(True, True), (None, True), (None, False)]


def test_files_survive_data_that_cannot_be_replaced(tmp_path, linear, small_limit, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"old")

    def replace(self, target, replace=Path.replace):
        if target == tmp_path / "m.onnx.data":
            raise PermissionError("in use")
        return replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", replace)
    with pytest.raises(fq.ExportError, match="in use"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx", opset=17)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"m.onnx": b"old", "m.onnx.data": b"old"}
