"""inspect_onnx on whole networks: fakequant's files for TensorRT, and those of onnxruntime's own tool."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (  # noqa: TID251  # what fakequant's files are compared with
    CalibrationDataReader,
    QuantType,
    quantize_static,
)
from torch import nn

import fakequant as fq
from fakequant.export.inspect_onnx import InspectReport, inspect_onnx
from fakequant.export.kernels import KERNELS, WEIGHTED
from fakequant.export.load import load_model
from fakequant.export.reasons import reasons_for


class _Batch(CalibrationDataReader):
    """One batch for onnxruntime's calibration."""

    def __init__(self, name: str, batch: np.ndarray) -> None:
        self._feeds = iter([{name: batch}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.fixture(scope="module", params=["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def network(request, torchvision_models) -> tuple[str, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, batch = getattr(torchvision_models, request.param)(weights=None), torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of this batch, so that no layer's output vanishes
    model.train()(batch)
    return request.param, model.eval(), batch


@pytest.fixture(scope="module")
def for_tensorrt(network, tmp_path_factory) -> tuple[str, Path]:
    name, model, batch = network
    model, path = copy.deepcopy(model), tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    fq.quantize(model, "int8", example_inputs=(batch,), target="tensorrt")
    fq.calibrate(model, [batch], progress=False)
    fq.export_onnx(model, (batch,), path)
    return name, path


@pytest.fixture(scope="module", params=["uint8", "int8"])
def by_onnxruntime(request, network, tmp_path_factory) -> tuple[str, Path]:
    """The network quantized by onnxruntime's own tool; its default for activations is int8."""
    _, model, batch = network
    folder = tmp_path_factory.mktemp("onnxruntime")
    torch.onnx.export(model, (batch,), folder / "float.onnx", dynamo=True, external_data=False, verbose=False)
    name = onnx.load(folder / "float.onnx").graph.input[0].name
    dtype = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}[request.param]
    quantize_static(folder / "float.onnx", folder / "m.onnx", _Batch(name, batch.numpy()), activation_type=dtype)
    return request.param, folder / "m.onnx"


def agrees(path: Path, integer_ops: Callable[[Path], Counter[str]]) -> InspectReport:
    """Return the report after comparing it with the optimized graph, and every reason with what became integer."""
    report = inspect_onnx(path)
    assert Counter(op.kernel for op in report.integer_ops if op.kernel != "MaxPool") == integer_ops(path)
    nodes = [node for node in load_model(path).graph if node.op_type in KERNELS]
    for op, node in zip(report.ops, nodes, strict=True):
        if op.has_qdq and op.kernel != "folded":
            assert bool(reasons_for(node)) != op.is_integer, op
    return report


def test_a_network_for_tensorrt_runs_in_floats(for_tensorrt, integer_ops):
    name, path = for_tensorrt
    report = agrees(path, integer_ops)
    convolutions = [op for op in report.ops if op.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)
    assert all(op.module for op in convolutions)
    # Two projections of MobileNet, with nothing between them and the Q of the next layer, do fuse.
    assert sum(op.is_integer for op in convolutions) == {"resnet18": 0, "mobilenet_v2": 2}[name]
    assert all(op.is_integer or op.reason for op in convolutions)
    assert "unknown" not in str(report)


def test_a_network_by_onnxruntime(by_onnxruntime, integer_ops):
    dtype, path = by_onnxruntime
    report = agrees(path, integer_ops)
    weighted = [op for op in report.ops if op.op_type in WEIGHTED or op.op_type == "Add"]
    if dtype == "uint8":
        assert all(op.is_integer for op in weighted)
    else:  # int8 tensors that a residual Add and a Conv read stay int8
        assert any("its input is int8 and is read by 2 ops" in op.reason for op in weighted)
