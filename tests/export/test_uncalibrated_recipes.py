"""Recipes that need no calibration: quantize, export, run in ONNX Runtime."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fakequant as fq

D = fq.QuantDescriptor
RECIPES = ("dynamic", "dynamic-per-token", "int4")


class Product(nn.Module):
    """``relu(x @ w + b)``, [..., 33] to [..., 17]."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(33, 17)), nn.Parameter(torch.randn(17))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w + self.b)


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(33, 40), nn.ReLU(), nn.Linear(40, 17, bias=False))
    return {
        "rows": (mlp, torch.randn(7, 33) + 0.3),
        "sequences": (copy.deepcopy(mlp), torch.randn(2, 5, 33) + 0.3),
        "matmul": (Product(), torch.randn(7, 33)),
        "batched-matmul": (Product(), torch.randn(2, 5, 33)),
        "attention": (nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), torch.randn(2, 5, 32)),
    }


@pytest.fixture
def written(tmp_path):
    def run(model: nn.Module, x: Tensor, recipe, **options) -> tuple[nn.Module, str]:
        model.eval()
        fq.quantize(model, recipe, example_inputs=(x,), target="onnxruntime")
        fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime", **options)
        return model, tmp_path / "m.onnx"

    return run


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "matmul",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequences", "batched-matmul", "attention")),
    ],
)
def test_the_file_computes_what_torch_does(written, name, recipe):
    model, x = models()[name]
    report = fq.validate_onnx(written(model, x, recipe)[1], model, [x])
    assert report.simulated.sqnr_db >= 50
    assert (report.simulated.max_steps or 0) <= 1
    assert (report.optimized.max_steps or 0) <= 2
    assert report.integer_ops == report.quantized_ops > 0


@pytest.mark.parametrize("recipe", ["dynamic", "dynamic-per-token"])
def test_the_optimized_file_computes_what_torch_does(written, recipe):
    model, x = models()["sequences"]
    assert fq.validate_onnx(written(model, x, recipe)[1], model, [x]).optimized.sqnr_db >= 50


@pytest.mark.parametrize(("name", "kernel"), [("dynamic", "DynamicQuantizeMatMul"), ("int4", "MatMulNBits")])
@pytest.mark.parametrize("rank", ["rows", "sequences"])
def test_every_layer_is_one_integer_kernel(written, optimized_ops, rank, name, kernel):
    model, x = models()[rank]
    ops = optimized_ops(written(model, x, name)[1])
    assert ops[kernel] == 2
    assert not {"MatMul", "Gemm", "FusedGemm", "DequantizeLinear"} & set(ops)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("recipe", ["dynamic", "dynamic-per-token"])
def test_opsets(written, recipe, opset):
    model, x = models()["rows"]
    assert fq.validate_onnx(written(model, x, recipe, opset=opset)[1], model, [x]).simulated.max_steps <= 1


def test_convolutions_are_of_integers(written):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, stride=2))
    x = torch.randn(2, 3, 9, 9)
    report = fq.validate_onnx(written(model, x, "dynamic")[1], model, [x])
    assert (report.integer_ops, report.quantized_ops, report.simulated.max_steps) == (2, 2, 0)


def test_a_range_is_that_of_the_call(written):
    """What a fixed range would clip is exact to half a step of the new range."""
    model, x = models()["rows"]
    _, path = written(model, x, "dynamic")
    assert fq.validate_onnx(path, model, [x, 100 * x]).simulated.sqnr_db >= 50


def test_a_file_with_a_dynamic_batch(written):
    model, x = models()["rows"]
    _, path = written(model, x, "dynamic", dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert fq.validate_onnx(path, model, [x[:3]]).simulated.max_steps <= 1


def test_sequences_of_one_range_share_one_quantizer(written):
    model, x = models()["attention"]
    _, path = written(model, x, "dynamic")
    ops = [node.op_type for node in ir.load(path).graph]
    assert (ops.count("DynamicQuantizeLinear"), ops.count("MatMulInteger")) == (4, 4)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_blocks_are_two_codes_in_a_byte(written, size):
    torch.manual_seed(0)
    model, x = nn.Linear(256, 64, bias=False), torch.randn(3, 256)
    _, path = written(
        model, x, fq.Recipe(ops=None) + fq.Rule(input=None, weight=D(4, block_size=size, block_axis=1, dynamic=True))
    )
    (node,) = [node for node in ir.load(path).graph if node.op_type == "DequantizeLinear"]
    codes, scale = node.inputs[:2]
    assert (codes.dtype, codes.const_value.nbytes) == (ir.DataType.INT4, 256 * 64 // 2)
    assert tuple(scale.shape) == (256 // size, 64)


def test_compare_follows_dynamic_quantizers(written):
    model, x = models()["rows"]
    report = fq.compare(model, written(model, x, "dynamic")[1], x)
    assert [(layer.name, layer.steps) for layer in report.layers[:2]] == [
        ("0._input_quantizer", 0),
        ("2._input_quantizer", 0),
    ]
    assert report.layers[1].sources == ("0._input_quantizer",)
    assert report.notes == ()


@pytest.mark.parametrize("recipe", ["dynamic", "dynamic-per-token"])
def test_validation_finds_a_wrong_scale(written, recipe):
    model, x = models()["sequences"]
    _, path = written(model, x, recipe)
    file = ir.load(path)
    wrong = next(value for name, value in file.graph.initializers.items() if name.endswith("0._weight_quantizer.scale"))
    wrong.const_value = ir.tensor(wrong.const_value.numpy() * np.float32(1.1), name=wrong.name)
    ir.save(file, path)
    report = fq.compare(model, path, x)
    assert report.first_divergence.name == "2._input_quantizer"


def test_inspect_knows_the_integer_forms(written):
    model, x = models()["rows"]
    report = fq.inspect_onnx(written(model, x, "dynamic")[1])
    assert [(op.op_type, op.kernel, op.module) for op in report.integer_ops] == [
        ("MatMulInteger", "DynamicQuantizeMatMul", "0"),
        ("MatMulInteger", "DynamicQuantizeMatMul", "2"),
    ]
    assert report.float_with_qdq == ()


def test_the_report_counts_the_integer_weights(written, tmp_path):
    model, x = models()["rows"]
    written(model, x, "dynamic")
    report = fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime")
    assert (report.integer_weights, report.float_ops) == (2, {})


@pytest.mark.parametrize("bits", [(4, 3), (5, 2)], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("name", ["rows", "sequences"])
def test_fp8_survives_the_optimizations(tmp_path, name, bits):
    model, x = models()[name]
    fq.quantize(model.eval(), fq.Recipe(ops=None) + fq.Rule(input=D(bits), weight=D(bits, axis=0)))
    fq.calibrate(model, [x], progress=False, forward=lambda model, x: model(x))
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime")
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).optimized.sqnr_db >= 110
