"""torch.onnx.export by itself gives standard Q/DQ, with both of torch's exporters."""

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export.graph import constant_of

D = fq.QuantDescriptor
BOTH = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


def export(model: nn.Module, x: torch.Tensor, path, dynamo: bool, **options) -> ir.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, **options)
    onnx.checker.check_model(path, full_check=True)
    return ir.load(path)


def run(path, x: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def plain(request, tmp_path_factory):
    """Return a CNN, its batch, the path of its file and its graph, once for each exporter."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 4),
        nn.Flatten(2),
        nn.Linear(49, 4),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 6, 6)
    fq.quantize(model)
    fq.calibrate(model, [x], progress=False)
    path = tmp_path_factory.mktemp("plain") / "m.onnx"
    return model, x, path, export(model, x, path, request.param).graph


def test_onnxruntime_computes_the_same(plain):
    model, x, path, _ = plain
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(run(path, x), expected, atol=1e-5 * np.abs(expected).max())


def test_there_are_no_custom_ops(plain):
    assert {node.domain for node in plain[3]} == {""}


def test_every_quantizer_is_a_pair(plain):
    ops = [node.op_type for node in plain[3]]
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (6, 6)


def test_scales_are_constant_and_positive(plain):
    for node in plain[3]:
        if node.op_type == "QuantizeLinear":
            assert (constant_of(node.inputs[1]) > 0).all()


def test_zero_points_are_int8_zeros(plain):
    for node in plain[3]:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            zero_point = constant_of(node.inputs[2])
            assert zero_point.dtype == np.int8
            assert not zero_point.any()


def test_weights_have_their_channel_axis(plain):
    axes = [
        node.attributes.get_int("axis")
        for node in plain[3]
        if node.op_type == "QuantizeLinear" and constant_of(node.inputs[1]).size > 1
    ]
    assert axes == [0, 1, 0]


@BOTH
@pytest.mark.parametrize(
    ("descriptor", "dtype"),
    [
        pytest.param(D(8, unsigned=True, amax=0.8), ir.DataType.UINT8, id="uint8"),
        pytest.param(D(4, amax=0.8), ir.DataType.INT8, id="int4"),
        pytest.param(D(4, axis=1, narrow_range=True, amax=[[0.3, 0.8, 0.5]]), ir.DataType.INT8, id="int4-per-channel"),
    ],
)
def test_other_grids(tmp_path, dynamo, descriptor, dtype):
    quantizer, x = fq.TensorQuantizer(descriptor), torch.randn(20, 3)
    graph = export(quantizer, x, tmp_path / "m.onnx", dynamo).graph
    (node,) = [n for n in graph if n.op_type == "QuantizeLinear"]
    assert constant_of(node.inputs[2]).dtype == dtype.numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), quantizer(x).numpy(), rtol=1e-6)


@BOTH
def test_two_narrow_quantizers_may_read_one_tensor(tmp_path, dynamo):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = fq.TensorQuantizer(D(4, amax=0.8)), fq.TensorQuantizer(D(4, amax=0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    model, x = Model(), torch.randn(20, 3)
    export(model, x, tmp_path / "m.onnx", dynamo)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), model(x).numpy(), rtol=1e-6)


def test_fp8_with_dynamo(tmp_path):
    quantizer, x = fq.TensorQuantizer(D((4, 3), amax=0.8)), torch.randn(20, 3)
    export(quantizer, x, tmp_path / "m.onnx", True, opset_version=19)
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", x), quantizer(x).numpy())


def test_fp8_with_torchscript_is_an_error(tmp_path):
    with pytest.raises(fq.ExportError, match=r"FP8 needs torch\.onnx\.export\(dynamo=True\)"):
        export(fq.TensorQuantizer(D((4, 3), amax=0.8)), torch.randn(2, 3), tmp_path / "m.onnx", False)


@BOTH
def test_an_uncalibrated_quantizer_is_an_error(tmp_path, dynamo):
    layer = nn.Linear(4, 4)
    fq.quantize(layer)
    with pytest.raises((fq.ExportError, torch.onnx.OnnxExporterError), match="expected a calibrated quantizer"):
        export(layer, torch.randn(3, 4), tmp_path / "m.onnx", dynamo)


@BOTH
def test_two_kept_axes_are_an_error(tmp_path, dynamo):
    quantizer = fq.TensorQuantizer(D(8, axis=(0, 1), amax=[[1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises((fq.ExportError, torch.onnx.OnnxExporterError), match="no multi-axis quantization"):
        export(quantizer, torch.randn(2, 2), tmp_path / "m.onnx", dynamo)


def test_a_model_that_torch_cannot_capture_is_not_written_without_quantizers(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = fq.TensorQuantizer(D(amax=1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.onnx.is_in_onnx_export():
                raise ValueError("cannot be traced")
            return self.quantizer(x)

    with pytest.raises(torch.onnx.OnnxExporterError, match="cannot be traced"):
        export(Model(), torch.randn(2, 3), tmp_path / "m.onnx", True)


@BOTH
def test_the_training_gradient_is_untouched_by_an_export(tmp_path, dynamo):
    quantizer, x = fq.TensorQuantizer(D(amax=0.8)), torch.randn(20, 3, requires_grad=True)
    export(quantizer, x.detach(), tmp_path / "m.onnx", dynamo)
    quantizer(x).sum().backward()
    assert x.grad.unique().tolist() == [0.0, 1.0]


DYNAMIC = {
    "tensor": D(8, dynamic=True),
    "affine": D(8, dynamic=True, affine=True, unsigned=True),
    "tokens": D(8, dynamic=True, axis="tokens"),
}


def dynamic(grid: fq.QuantDescriptor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    fq.quantize(model, fq.Recipe((fq.Rule(type="Linear", input=grid, weight=D(8, axis=0, dynamic=True)),)))
    return model


@pytest.mark.parametrize("grid", DYNAMIC.values(), ids=DYNAMIC)
def test_a_dynamic_range_is_that_of_each_run(grid, tmp_path):
    model, x = dynamic(grid), torch.randn(2, 4)
    export(model, x, tmp_path / "m.onnx", dynamo=True)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", 3 * x), model(3 * x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("grid", DYNAMIC.values(), ids=DYNAMIC)
def test_a_dynamic_range_is_no_constant_of_a_torchscript_file(grid, tmp_path):
    with pytest.raises(fq.ExportError, match="would write the range of the example into the file as a constant"):
        export(dynamic(grid), torch.randn(2, 4), tmp_path / "m.onnx", dynamo=False)
