"""The papers' schemes through export_onnx: the file computes what torch does, with the scheme's codes as weights."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant import QuantDescriptor, Recipe, Rule

WEIGHTS = {
    "twn": QuantDescriptor(2, scheme="twn", axis=0),
    "bnn": QuantDescriptor(1, scheme="bnn"),
    "xnor": QuantDescriptor(1, scheme="xnor", axis=0),
    "dorefa-1": QuantDescriptor(1, scheme="dorefa"),
    "dorefa-4": QuantDescriptor(4, scheme="dorefa"),
    "dorefa-8": QuantDescriptor(8, scheme="dorefa"),  # int16
}
SIGNS = QuantDescriptor(1, scheme="bnn")
X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def quantized(weight: QuantDescriptor, activation: QuantDescriptor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    fq.quantize(model, Recipe((Rule("0"), Rule("2", weight=weight, input=activation))))
    fq.calibrate(model, [X], progress=False)
    return model


@pytest.mark.parametrize(
    ("weight", "activation", "target"),
    [
        *((weight, QuantDescriptor(8), "onnxruntime") for weight in WEIGHTS.values()),
        *((WEIGHTS["xnor"], SIGNS, target) for target in ("tensorrt", "onnxruntime")),
    ],
    ids=str,
)
def test_a_file_computes_what_torch_does(weight, activation, target, tmp_path):
    model = quantized(weight, activation)
    fq.export_onnx(model, (X,), tmp_path / "m.onnx", target=target)
    report = fq.validate_onnx(tmp_path / "m.onnx", model, [X])
    assert report.simulated.max_steps == 0
    assert report.optimized.max_steps <= 1
    assert report.simulated.sqnr_db > 80


@pytest.mark.parametrize(
    ("name", "codes"), [("twn", {-1, 0, 1}), ("xnor", {-1, 1}), ("dorefa-4", set(range(-15, 16, 2)))]
)
def test_the_file_holds_the_codes_of_the_scheme(name, codes, tmp_path):
    model = quantized(WEIGHTS[name], SIGNS)
    fq.export_onnx(model, (X,), tmp_path / "m.onnx", target="tensorrt")
    initializers = ir.load(tmp_path / "m.onnx").graph.initializers.values()
    stored = [v.const_value.numpy() for v in initializers if v.shape == (16, 16, 3, 3)]
    assert [w.dtype for w in stored] == [np.int8]
    assert set(np.unique(stored[0])) <= codes
