"""Targets that share a placement: one model, calibrated once, four kinds of files."""

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export.graph import TARGET_KEY
from fakequant.export.targets import target_named
from fakequant.placement import targets
from fakequant.targets import placement_names, placement_of

ALL = {"onnxruntime": "onnxruntime", "onnxruntime-cuda": "tensorrt", "tensorrt": "tensorrt", "tensorrt-ep": "tensorrt"}
OTHERS = ["tensorrt-ep", "onnxruntime-cuda"]
X = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual add, whose other operand only ONNX Runtime's CPU wants quantized, and a BatchNorm to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x)) + x).mean((2, 3)))


def quantized(target: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    fq.quantize(model, example_inputs=X, target=target)
    fq.calibrate(model, [X], progress=False)
    return model


@pytest.mark.parametrize(("target", "placement"), ALL.items())
def test_a_target_is_known_everywhere(target, placement):
    assert target_named(target).name == target
    assert placement_of(target) == placement


def test_every_placement_is_one():
    assert set(targets()) == placement_names() == set(ALL.values())


@pytest.mark.parametrize("target", OTHERS)
def test_a_plan_is_that_of_tensorrt(target):
    planned = [fq.plan(Net(), X, name) for name in (target, "tensorrt", "onnxruntime")]
    assert planned[0].report.edges == planned[1].report.edges
    assert [slot.grids for slot in planned[0].slots] == [slot.grids for slot in planned[1].slots]
    assert planned[0].report.edges != planned[2].report.edges


@pytest.mark.parametrize("target", OTHERS)
def test_a_model_quantized_for_it_is_one_quantized_for_tensorrt(target):
    model, expected = quantized(target), quantized("tensorrt")
    assert str(model) == str(expected)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("target", OTHERS)
def test_there_from_onnxruntime(target):
    model, expected = quantized("onnxruntime"), quantized("tensorrt")
    fq.retarget(model, target)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("target", OTHERS)
def test_without_an_example_too(target):
    model = Net()
    assert "1 of 1 Conv2d quantized" in str(fq.quantize(model, target=target))


@pytest.mark.parametrize("target", OTHERS)
def test_its_file_is_that_of_tensorrt(target, tmp_path):
    model = quantized("onnxruntime")
    for name in (target, "tensorrt"):
        report = fq.export_onnx(model, (X,), tmp_path / f"{name}.onnx", target=name)
        assert (report.target, report.folded_batchnorms) == (name, 1)
    files = [ir.load(tmp_path / f"{name}.onnx") for name in (target, "tensorrt")]
    assert [file.metadata_props.pop(TARGET_KEY) for file in files] == [target, "tensorrt"]
    assert ir.to_proto(files[0]) == ir.to_proto(files[1])
    assert files[0].opset_imports[""] in range(19, 22)


@pytest.mark.parametrize("target", OTHERS)
def test_its_file_is_validated_with_its_placement(target, tmp_path):
    model = quantized("onnxruntime")
    fq.export_onnx(model, (X,), tmp_path / "m.onnx", target=target)
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [X]).simulated.sqnr_db >= 50


@pytest.mark.parametrize("target", OTHERS)
def test_its_file_is_clean(target, tmp_path):
    fq.export_onnx(quantized(target), (X,), tmp_path / "m.onnx", target=target)
    assert fq.check_onnx(tmp_path / "m.onnx", target=target).findings == ()


@pytest.mark.parametrize("target", [*OTHERS, "tensorrt"])
def test_a_recipe_gives_them_the_same_rules(target):
    rules = fq.Rule("conv", target="tensorrt"), fq.Rule("fc", target="onnxruntime"), fq.Rule("conv")
    recipe = fq.Recipe(rules=rules)
    assert recipe.for_target(target).rules == (rules[0], rules[2])
