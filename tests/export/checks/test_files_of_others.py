"""Files that ONNX Runtime's quantizer makes by default, which TensorRT does not take."""

import importlib

import numpy as np
import onnx
import pytest
from graph_texts import graph

import fakequant as fq

FLOAT_NET = graph(
    "float[1, 16, 8, 8] x",
    "float[1, 16] y",
    """c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c)
    p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB = 1>(f, m, b)""",
    "float[16, 16, 3, 3] w = {0.1...}, float[16] b = {0.5...}, float[16, 16] m = {0.2...}",
)


class Batches:
    """The calibration data that quantize_static asks for."""

    def __init__(self) -> None:
        self._left = iter([{"x": np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)}])

    def get_next(self):
        return next(self._left, None)


@pytest.fixture(scope="module")
def quantize_static():
    """Return the quantizer, by name: the package has no use for it but to compare."""
    quantization = importlib.import_module("onnxruntime.quantization")

    class Reader(Batches, quantization.CalibrationDataReader):
        pass

    def run(source, path, **options):
        quantization.quantize_static(source, path, Reader(), **options)
        return fq.check_onnx(path)

    run.operators = quantization.QuantFormat.QOperator
    run.int8, run.uint8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
    return run


@pytest.fixture
def net(tmp_path, parsed):
    onnx.save(parsed(FLOAT_NET), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def rules(report) -> set[str]:
    return {finding.rule for finding in report.errors}


@pytest.mark.filterwarnings("ignore")
class TestQuantizeStatic:
    def test_default_settings(self, quantize_static, net, tmp_path):
        report = quantize_static(net, tmp_path / "m.onnx")
        assert rules(report) == {"R1", "R3"}

    def test_uint8(self, quantize_static, net, tmp_path):
        report = quantize_static(net, tmp_path / "m.onnx", activation_type=quantize_static.uint8)
        assert {"R1", "R2", "R3"} <= rules(report)
        (found,) = [f for f in report.errors if f.rule == "R1" and f.node == "x_QuantizeLinear"]
        assert "expected zero point 0, got 1" in found.problem

    def test_operator_format(self, quantize_static, net, tmp_path):
        report = quantize_static(net, tmp_path / "m.onnx", quant_format=quantize_static.operators)
        assert "R12" in rules(report)
        assert any("QLinearConv" in f.problem for f in report.errors)

    def test_the_settings_that_tensorrt_wants(self, quantize_static, net, tmp_path):
        options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        report = quantize_static(
            net,
            tmp_path / "m.onnx",
            activation_type=quantize_static.int8,
            weight_type=quantize_static.int8,
            per_channel=True,
            extra_options=options,
        )
        assert report.errors == ()
