"""What export_onnx refuses, and that a refusal leaves nothing behind."""

import copy

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
        ({"opset": 17}, fq.InvalidValueError, "opset: expected 18 to 21, got 17"),
        ({"opset": 22}, fq.InvalidValueError, "opset: expected 18 to 21, got 22"),
        ({"dynamic_shapes": ({7: torch.export.Dim("batch")},)}, fq.ExportError, "torch.onnx.export failed for Quant"),
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
        fq.export_onnx(model, ARGS, tmp_path / "m.onnx", opset=given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_weights_that_are_not_float32(tmp_path, linear, dtype):
    with pytest.raises(fq.ExportError, match=rf"expected float32 weights, got weight \({dtype}\).*model\.float\(\)"):
        fq.export_onnx(linear.to(dtype), (torch.zeros(3, 4, dtype=dtype),), tmp_path / "m.onnx")


def test_a_half_model_is_exported_once_it_is_float(tmp_path, linear):
    fq.export_onnx(linear.half().float(), ARGS, tmp_path / "m.onnx")
    assert fq.validate_onnx(tmp_path / "m.onnx", linear, ARGS).simulated.max_steps == 0


class Untraceable(nn.Module):
    """Fails when it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise ValueError("cannot be traced")
        return self.norm(self.layer(x))


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Return a model whose export failed, a copy of it from before, the folder, and the error."""
    folder = tmp_path_factory.mktemp("failed")
    model = Untraceable()
    fq.quantize(model)
    fq.calibrate(model, [torch.randn(3, 4)], progress=False)
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model)
    with pytest.raises(fq.ExportError) as error:
        fq.export_onnx(model, ARGS, folder / "m.onnx")
    return model, before, folder, error.value


def test_a_failed_export_says_why(failed):
    assert "cannot be traced" in str(failed[3])


def test_a_failed_export_writes_nothing(failed):
    assert list(failed[2].iterdir()) == []


def test_a_failed_export_leaves_the_modes(failed):
    model, before, *_ = failed
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_a_failed_export_leaves_the_state(failed):
    model, before, *_ = failed
    for (name, value), (_, expected) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def test_a_failed_export_leaves_no_hooks(failed):
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in failed[0].modules())


def test_two_kept_axes(tmp_path):
    recipe = fq.Recipe() + fq.Rule(weight=D(axis=(0, 1)), input=D(amax=1.0))
    model = nn.Linear(4, 4)
    fq.quantize(model, recipe)
    fq.calibrate(model, ARGS, progress=False)
    with pytest.raises(fq.ExportError, match=r"_weight_quantizer: scale: expected one axis .*, got shape \(4, 4\)"):
        fq.export_onnx(model, ARGS, tmp_path / "m.onnx")


def test_an_export_leaves_the_model(cnn):
    assert not cnn.model.training
    assert not cnn.model.bn1.training
    assert all(not m._forward_hooks for m in cnn.model.modules())


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


def test_an_existing_file_survives_a_failed_export(tmp_path, linear):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(fq.ExportError):
        fq.export_onnx(linear, (torch.zeros(3, 5),), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_graph_that_the_checker_refuses_is_not_written(tmp_path, linear, monkeypatch):
    def refuse(*_, **__) -> None:
        raise onnx.checker.ValidationError("wrong")

    monkeypatch.setattr("onnx.checker.check_model", refuse)
    with pytest.raises(fq.ExportError, match="the exported graph is not valid ONNX: wrong"):
        fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_has_its_data_beside_it(tmp_path, linear, monkeypatch):
    monkeypatch.setattr("fakequant.export.to_onnx._EXTERNAL_DATA_ABOVE", 10)
    report = fq.export_onnx(linear, ARGS, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.size == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert fq.validate_onnx(tmp_path / "m.onnx", linear, ARGS).simulated.max_steps == 0
