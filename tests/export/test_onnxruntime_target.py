"""Files for ONNX Runtime: integer kernels wherever there are some, and the numbers of the torch model."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export.graph import constant_of


class Net(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function, **children) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs=16, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def optimized_ops(path, folder) -> Counter:
    """Count the ops of the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture
def placed(tmp_path):
    """Quantize for TensorRT, calibrate, export for ONNX Runtime; return the model, the file, and its optimized ops."""

    def run(model, x, **options):
        model.eval()
        fq.quantize(model, example_inputs=x, target="tensorrt")
        fq.calibrate(model, [x], progress=False)
        path = tmp_path / "model.onnx"
        fq.export_onnx(model, (x,), path, target="onnxruntime", **options)
        return model, path, optimized_ops(path, tmp_path)

    return run


def ends(function, **children):
    """Return a network that ends in a mean and a linear layer."""
    return Net(lambda m, x: m.fc(function(m, x).mean((2, 3))), fc=nn.Linear(16, 16), **children)


IMAGE = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
TAIL = {"QLinearGlobalAveragePool": 1, "QGemm": 1}
NETS = {
    "conv": (lambda: ends(lambda m, x: m.a(x), a=conv()), {"QLinearConv": 1}),
    "conv bn relu": (
        lambda: ends(lambda m, x: F.relu(m.n(m.a(x))), a=conv(bias=False), n=nn.BatchNorm2d(16)),
        {"QLinearConv": 1},
    ),
    "relu6": (lambda: ends(lambda m, x: m.b(nn.ReLU6()(m.a(x) * 1)), a=conv(), b=conv()), None),
    "conv relu6 conv": (
        lambda: ends(lambda m, x: m.b(F.relu6(m.a(x))), a=conv(), b=conv()),
        {"QLinearConv": 2},
    ),
    "residual": (lambda: ends(lambda m, x: F.relu(m.a(x) + x), a=conv()), {"QLinearConv": 1, "QLinearAdd": 1}),
    "max pool": (lambda: ends(lambda m, x: F.max_pool2d(F.relu(m.a(x)), 2), a=conv()), {"QLinearConv": 1}),
    "average pool": (
        lambda: ends(lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), a=conv(), b=conv()),
        {"QLinearConv": 2, "QLinearAveragePool": 1},
    ),
    "cat": (
        lambda: ends(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), a=conv(), b=conv(), c=conv(32)),
        None,
    ),
    "cat of relus": (
        lambda: ends(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)), a=conv(), b=conv(), c=conv(32)),
        {"QLinearConv": 3, "QLinearConcat": 1},
    ),
    "depthwise": (lambda: ends(lambda m, x: m.a(x), a=conv(groups=16)), {"QLinearConv": 1}),
    "silu": (lambda: ends(lambda m, x: m.b(F.silu(m.a(x))), a=conv(), b=conv()), {"QLinearConv": 2}),
}


@pytest.mark.parametrize("net", NETS)
def test_the_file_computes_what_torch_does(net, placed):
    model, path, _ = placed(NETS[net][0](), IMAGE)
    found = fq.validate_onnx(path, model, [IMAGE])
    assert found.simulated.max_steps <= 1
    assert found.optimized.max_steps <= 2


@pytest.mark.parametrize("net", [net for net, (_, ops) in NETS.items() if ops is not None])
def test_every_op_with_an_integer_kernel_runs_on_it(net, placed):
    _, _, ops = placed(NETS[net][0](), IMAGE)
    expected = {**NETS[net][1], **TAIL}
    assert {op: count for op, count in ops.items() if op.startswith("Q") and op != "QuantizeLinear"} == expected
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "ReduceMean", "Relu", "Clip"} & set(ops)


def graph_of(path) -> ir.Graph:
    return ir.load(path).graph


def test_activations_are_uint8_and_weights_int8(placed):
    _, path, _ = placed(ends(lambda m, x: F.relu(m.a(x) + x), a=conv()), IMAGE)
    for node in graph_of(path):
        if node.op_type == "QuantizeLinear":
            assert node.outputs[0].dtype == ir.DataType.UINT8
        elif node.op_type == "DequantizeLinear" and (codes := constant_of(node.inputs[0])) is not None:
            assert codes.dtype in (np.int8, np.int32)


def test_codes_start_at_zero_for_what_is_never_negative_and_at_128_below_for_the_rest(placed):
    _, path, _ = placed(ends(lambda m, x: F.relu(m.a(x) + x), a=conv()), IMAGE)
    zero_points = Counter(
        int(constant_of(node.inputs[2])) for node in graph_of(path) if node.op_type == "QuantizeLinear"
    )
    # The input and the convolution's output; the sum behind its ReLU and the mean of it.
    assert zero_points == {128: 2, 0: 2}


def test_one_tensor_has_one_q(placed):
    _, path, _ = placed(ends(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()), IMAGE)
    read = [node.inputs[0] for node in graph_of(path) if node.op_type == "QuantizeLinear"]
    assert len(read) == len(set(read))


class Encoder(nn.Module):
    """A feed-forward block of a transformer, [N, 12, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_linear_layers_of_a_transformer_are_integer_products_with_float_results(placed):
    x = torch.randn(2, 12, 32)
    model, path, ops = placed(Encoder(), x)
    assert ops["MatMulIntegerToFloat"] == 2
    assert ops["Gelu"] == 1
    assert not {"Gemm", "MatMul"} & set(ops)
    assert fq.validate_onnx(path, model, [x]).optimized.max_steps <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "convolutions", "adds"), [("resnet18", 20, 8), ("resnet50", 53, 16), ("mobilenet_v2", 52, 10)]
)
def test_networks_run_as_integers_from_end_to_end(name, convolutions, adds, torchvision_models, placed):
    x = torch.randn(1, 3, 64, 64)
    model, path, ops = placed(getattr(torchvision_models, name)(weights=None), x)
    expected = {"QLinearConv": convolutions, "QLinearAdd": adds, **TAIL}
    assert {op: count for op, count in ops.items() if op.startswith("Q") and op != "QuantizeLinear"} == expected
    assert fq.validate_onnx(path, model, [x]).simulated.max_steps <= 1
