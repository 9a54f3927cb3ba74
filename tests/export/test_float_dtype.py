"""export_onnx(float_dtype=...): what a file of another float type holds, and what it computes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

import fakequant as fq
from fakequant.export.graph import constant_of

D = fq.QuantDescriptor
FLOAT16 = ir.DataType.FLOAT16
PAIR = {"QuantizeLinear", "DequantizeLinear"}


class Block(nn.Module):
    """A transformer block with a mask, [N, T, 32] and [N, 1, 1, T] to [N, T, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def block_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 32), (torch.arange(8) < torch.tensor([[8], [5]])).long()[:, None, None]


@pytest.fixture(scope="module")
def half_cnn(cnn, tmp_path_factory) -> tuple[Path, fq.export.ExportReport]:
    """The residual CNN's float16 file and its report."""
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    return path, fq.export_onnx(cnn.model, cnn.args, path, float_dtype="float16")


def in_onnx_runtime(path, x: Tensor) -> np.ndarray:
    session = fq.export.Session(path, optimized=False)
    return next(iter(session.run({next(iter(session.inputs)): x.numpy().astype(np.float16)}).values()))


def test_a_float16_file_holds_float16_and_codes(half_cnn):
    path, report = half_cnn
    model = ir.load(path)
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    assert {value.dtype for value in values} == {FLOAT16, ir.DataType.INT8, ir.DataType.INT64}
    assert not [node for node in model.graph if node.op_type == "Cast"]
    assert (report.float32_layers, report.clamped_constants) == ({}, {})


def test_a_float16_file_is_a_step_from_torch(half_cnn, cnn):
    report = fq.validate_onnx(half_cnn[0], cnn.model, cnn.args)
    assert report.simulated.max_steps <= 1
    assert report.simulated.moved < 0.02
    assert report.simulated.sqnr_db >= 40


def test_its_scales_are_torchs_rounded(half_cnn, cnn):
    scale = constant_of(ir.load(half_cnn[0]).graph.initializers["fc._input_quantizer.scale"])
    assert scale.dtype == np.float16
    assert scale == np.float16(cnn.model.fc.input_quantizer.scale.item())


def test_tensorrt_takes_it(half_cnn):
    report = fq.check_onnx(half_cnn[0], target="tensorrt")
    assert not [finding for finding in report.findings if finding.rule in {"R4", "R6", "R7", "R16", "R20"}]


def test_float_weights_become_the_same_codes(half_cnn, cnn, tmp_path):
    fq.export_onnx(cnn.model, cnn.args, tmp_path / "m.onnx", float_dtype="float16", weights="float")
    stored = {n.name: constant_of(n.inputs[0]) for n in ir.load(half_cnn[0]).graph if n.op_type == "DequantizeLinear"}
    weights = [n for n in ir.load(tmp_path / "m.onnx").graph if n.name.endswith("_weight_quantizer.QuantizeLinear")]
    assert len(weights) == 5
    for node in weights:
        values, scale = (constant_of(value).astype(np.float32) for value in node.inputs[:2])
        shape = [1] * values.ndim
        shape[node.attributes.get_int("axis")] = -1
        codes = stored[node.name.replace("QuantizeLinear", "DequantizeLinear")]
        np.testing.assert_array_equal(np.rint(values / scale.reshape(shape)), codes)


def test_the_file_says_its_type(half_cnn, cnn):
    assert ir.load(half_cnn[0]).metadata_props["fakequant.float_dtype"] == "float16"
    assert "fakequant.float_dtype" not in ir.load(cnn.path).metadata_props
    assert [report.float_dtype for report in (half_cnn[1], cnn.report)] == ["float16", "float32"]
    assert "opset 19, float16, " in str(half_cnn[1])


def test_a_transformer_block(export):
    torch.manual_seed(0)
    exported = export(Block(), *block_inputs(), float_dtype="float16")
    report = exported.validate()
    assert report.simulated.max_steps <= 1
    assert report.simulated.sqnr_db >= 45
    assert exported.report.clamped_constants == {"node_masked_fill": "-3.40282e+38 became -65504"}
    assert {v.dtype for n in exported.graph for v in n.outputs} == {FLOAT16, ir.DataType.INT8, ir.DataType.BOOL}


def test_a_bfloat16_block_computes_the_same_in_onnxs_reference(export):
    torch.manual_seed(0)
    x, mask = block_inputs()
    exported = export(Block(), x, mask, float_dtype="bfloat16")
    feeds = dict(zip(("x", "mask"), (x.numpy().astype(ml_dtypes.bfloat16), mask.numpy()), strict=True))
    (got,) = ReferenceEvaluator(str(exported.path)).run(None, feeds)
    expected = exported.model(x, mask).detach().numpy()
    error = got.astype(np.float64) - expected
    assert 10 * np.log10(np.square(expected).sum() / np.square(error).sum()) >= 30


def test_a_dynamic_batch(export):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch")},)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(288, 4))
    exported = export(model, x, float_dtype="float16", dynamic_shapes=shapes)
    assert in_onnx_runtime(exported.path, torch.randn(5, 3, 8, 8)).shape == (5, 4)


def test_a_large_range_is_named_and_computed_in_float32(tmp_path, quantized):
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e5)
        model[2].weight.mul_(1e-5)
    model = quantized(model, x)
    report = fq.export_onnx(model, (x,), tmp_path / "m.onnx", float_dtype="float16")
    assert set(report.float32_layers) == {"0", "1", "2", "3"}
    assert "2._input_quantizer: values up to" in report.float32_layers["2"]
    assert "stays float32: 2: " in str(report)
    result = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert result.simulated.sqnr_db >= 40
    assert result.simulated.max_steps <= 1


def test_fp8_quantizers(export):
    torch.manual_seed(0)
    exported = export(
        nn.Linear(16, 16),
        torch.randn(4, 16),
        recipe=fq.Recipe() + fq.Rule(input=D((4, 3)), weight=D((4, 3), axis=0)),
        float_dtype="float16",
    )
    assert {n.inputs[1].dtype for n in exported.graph if n.op_type in PAIR} == {FLOAT16}
    assert exported.validate().simulated.sqnr_db >= 30


@pytest.mark.parametrize(("target", "opset"), [("tensorrt", 20), ("tensorrt-ep", 21), ("onnxruntime-cuda", None)])
def test_every_target_and_opset_with_float16_scales(export, target, opset):
    exported = export(nn.Linear(4, 4), torch.randn(3, 4), target=target, opset=opset, float_dtype="float16")
    assert {value.dtype for node in exported.graph for value in node.outputs} == {FLOAT16, ir.DataType.INT8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"float_dtype": "fp16"}, "float_dtype: expected 'float32' or one of"),
        ({"float_dtype": "float16", "opset": 18}, "opset: expected 19 or later"),
        ({"float_dtype": "float16", "target": "onnxruntime"}, "expected 'float32' for target 'onnxruntime'"),
    ],
    ids=["type", "opset", "target"],
)
def test_a_refusal_leaves_no_file(tmp_path, quantized, options, message):
    model = quantized(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(fq.InvalidValueError, match=message):
        fq.export_onnx(model, (torch.zeros(3, 4),), tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_optimizations_of_onnx_runtime_leave_the_biases_alone(half_cnn, cnn):
    # Its WeightBiasQuantization would compute their scales in float16: 18 steps off.
    report = fq.validate_onnx(half_cnn[0], cnn.model, cnn.args)
    assert report.optimized.max_steps <= 2
