"""examples/imagenet_resnet50.py, on a folder of a few random images in the shape of ImageNet."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "imagenet_resnet50.py"
pytestmark = pytest.mark.skipif(
    not EXAMPLE.is_file(), reason="the tests run against an installed wheel, not a checkout"
)
METHODS = ["max", "percentile 99.9", "percentile 99.99", "mse", "entropy"]


@pytest.fixture(scope="module")
def example(torchvision_models) -> ModuleType:
    spec = importlib.util.spec_from_file_location("imagenet_resnet50", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of JPEG and PNG images, a colour each, and sizes that differ."""
    image = pytest.importorskip("PIL.Image")
    root, generator = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(3):
            (root / split / f"n0000{label}").mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (70 + index, 80, 3), dtype=np.uint8)
                pixels[..., label] += 120
                ending = "png" if index % 2 else "JPEG"
                image.fromarray(pixels).save(root / split / f"n0000{label}" / f"{index}.{ending}")
    return root


OPTIONS = ["--model", "resnet18", "--image-size", "64", "--resize", "72", "--batch-size", "8"]
OPTIONS += ["--workers", "0", "--device", "cpu", "--validation-batches", "1"]


@pytest.fixture(scope="module")
def result(example, folder, tmp_path_factory) -> tuple[dict[str, float], Path]:
    """Run the whole recipe once; return its table and its output folder."""
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("output")
    return example.main([str(folder), "--weights", "none", "--output", str(output), *OPTIONS]), output


def test_the_table_has_every_method(result):
    names = list(result[0])
    assert names[:-1] == ["float", *(f"int8 PTQ, {method}" for method in METHODS)]
    assert names[-1].startswith("int8 QAT from ")


def test_accuracies_are_percentages_of_the_images(result):
    assert all(value == pytest.approx(round(value * 12 / 100) * 100 / 12) for value in result[0].values())


@pytest.mark.parametrize("file", ["resnet18_ptq.onnx", "resnet18_qat.onnx"])
def test_the_files_are_int8_and_take_any_batch(result, file):
    model = onnx.load(result[1] / file)
    onnx.checker.check_model(model)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == 20  # a head of three classes is too small


def test_fine_tuning_changed_the_weights(result):
    ptq, qat = (onnx.load(result[1] / f"resnet18_{name}.onnx").graph.initializer for name in ("ptq", "qat"))
    codes = [
        next(t.raw_data for t in tensors if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4)
        for tensors in (ptq, qat)
    ]
    assert codes[0] != codes[1]


def test_a_checkpoint_is_loaded(example, result, tmp_path):
    model = example.load_model("resnet18", "none", 3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    loaded = example.load_model("resnet18", str(tmp_path / "model.pth"), 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_the_defaults_are_the_recipe(example):
    args = example.parse(["folder"])
    assert (args.model, args.weights, args.calibration_images) == ("resnet50", "IMAGENET1K_V2", 1024)
    assert (args.epochs, args.learning_rate) == (1, 0.001)
