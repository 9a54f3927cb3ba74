import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fakequant

ROOT = Path(fakequant.__file__).parents[1]
LOADED_ON_USE = {"check_onnx", "compare", "export_onnx", "inspect_onnx", "validate_onnx"}


def test_all_is_sorted_and_without_duplicates():
    assert fakequant.__all__ == sorted(set(fakequant.__all__))


def test_all_is_every_public_name():
    public = {
        name
        for name, value in vars(fakequant).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    public -= {"TYPE_CHECKING", "Any"}
    modules = {"calib", "nn", "quant_modules", "tensor_quant"}
    assert set(fakequant.__all__) == public | modules | LOADED_ON_USE


@pytest.mark.parametrize("name", sorted(set(fakequant.__all__) - LOADED_ON_USE))
def test_name_is_there(name):
    assert name in vars(fakequant)


@pytest.mark.parametrize("name", sorted(LOADED_ON_USE))
def test_onnx_side_is_loaded_on_use(name):
    pytest.importorskip("onnx_ir")
    assert callable(getattr(fakequant, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fakequant' has no attribute 'quantise'"):
        fakequant.quantise  # noqa: B018


@pytest.mark.parametrize("name", [name for name in fakequant.__all__ if isinstance(getattr(fakequant, name), type)])
def test_public_class_has_a_docstring(name):
    assert getattr(fakequant, name).__doc__


@pytest.fixture(scope="module")
def after_import() -> set[str]:
    """Return the modules that importing fakequant in a new process loads."""
    code = "import fakequant, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["onnx", "onnx_ir", "onnxscript", "onnxruntime", "torchvision", "sklearn", "fakequant.export", "absl"]
)
def test_import_does_not_load(after_import, module):
    assert module not in after_import


def test_import_patches_nothing():
    assert torch.nn.Linear.__module__ == "torch.nn.modules.linear"


# What users of pytorch-quantization import, with the package name changed.


@pytest.mark.parametrize(
    "name",
    [
        "QuantDescriptor",
        "ScaledQuantDescriptor",
        "QUANT_DESC_8BIT_PER_TENSOR",
        "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
        "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
        *(f"QUANT_DESC_8BIT_CONV{d}D_WEIGHT_PER_CHANNEL" for d in (1, 2, 3)),
        *(f"QUANT_DESC_8BIT_CONVTRANSPOSE{d}D_WEIGHT_PER_CHANNEL" for d in (1, 2, 3)),
        "tensor_quant",
        "fake_tensor_quant",
        "fake_affine_tensor_quant",
        "scaled_e4m3",
    ],
)
def test_ancestors_name_in_tensor_quant(name):
    assert hasattr(fakequant.tensor_quant, name)


@pytest.mark.parametrize("name", ["initialize", "deactivate", "enable_onnx_export"])
def test_ancestors_name_in_quant_modules(name):
    assert getattr(fakequant.quant_modules, name) is getattr(fakequant, name)


@pytest.mark.parametrize("name", ["Calibrator", "MaxCalibrator", "HistogramCalibrator"])
def test_ancestors_name_in_calib(name):
    assert isinstance(getattr(fakequant.calib, name), type)


@pytest.mark.parametrize(
    "name",
    [
        "Linear",
        *(
            f"{kind}{d}d"
            for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveAvgPool")
            for d in (1, 2, 3)
        ),
    ],
)
def test_ancestors_short_name_in_nn(name):
    assert getattr(fakequant.nn, name) is getattr(fakequant.nn, f"Quant{name}")


@pytest.mark.parametrize("name", ["TensorQuantizer", "Clip", *(f"QuantInstanceNorm{d}d" for d in (1, 2, 3))])
def test_ancestors_name_in_nn(name):
    assert isinstance(getattr(fakequant.nn, name), type)


def test_nn_lists_what_it_has():
    public = {name for name, value in vars(fakequant.nn).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in public if not name.startswith("_")} | {"functional"} == set(fakequant.nn.__all__)


@pytest.mark.parametrize(
    "member",
    [
        *("enable", "disable", "enable_quant", "disable_quant", "enable_calib", "disable_calib", "load_calib_amax"),
        *("amax", "num_bits", "axis", "unsigned", "narrow_range", "fake_quant", "maxbound", "step_size", "scale"),
        "use_fb_fake_quant",
    ],
)
def test_ancestors_member_of_tensor_quantizer(member):
    assert hasattr(fakequant.TensorQuantizer(), member)


def test_numbers_that_everyone_knows():
    torch.manual_seed(12345)
    x = torch.rand(10)
    codes, scale = fakequant.tensor_quant.tensor_quant(x, x.abs().max())
    assert codes.int().tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert round(scale.item(), 4) == 128.0057
