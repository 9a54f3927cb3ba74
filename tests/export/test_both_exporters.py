"""torch has two exporters: opset 17 and below come from the TorchScript one, 18 and later from torch.export's."""

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import ExportReport, Session
from fakequant.export.graph import constant_of

pytestmark = pytest.mark.slow

TORCHSCRIPT, TORCH_EXPORT = 17, 18


class Convolutions(nn.Module):
    """Convolutions of each kind, BatchNorm, a residual sum, pools and a concatenation, [N, 3, 16, 16] to [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleDict({"a/b c": nn.Sequential(conv(groups=16), nn.BatchNorm2d(16))})
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2, bias=False)
        self.norm, self.act, self.last = nn.BatchNorm2d(16), nn.Hardswish(), conv(32)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        y = self.blocks["a/b c"](x)
        y += x
        x = F.relu(y)
        x = F.avg_pool2d(self.norm(self.up(x)), 2)
        return self.fc(self.act(self.last(torch.cat([x, x.sigmoid()], 1))).mean((2, 3)))


class Linears(nn.Module):
    """A layer called four times, two that tie their weight, two that read one tensor, a constant, [N, 32] to it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight
        self.register_buffer("constant", torch.randn(32, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x) + self.shared(self.shared(x).relu()) + self.shared(x)
        return (self.a(x) + self.b(x)) @ self.constant


class Encoder(nn.Module):
    """A layer of a transformer, [N, 24, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Attention(nn.Module):
    """torch's own attention, in a residual block, [N, 24, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


def conv(inputs: int = 16, **options) -> nn.Module:
    return nn.Conv2d(inputs, 16, 3, padding=1, **options)


IMAGE, ROWS, TOKENS = (2, 3, 16, 16), (4, 32), (2, 24, 32)
CASES = {
    "convolutions": (Convolutions, IMAGE, "tensorrt", ""),
    "convolutions-onnxruntime-dynamic": (Convolutions, IMAGE, "onnxruntime", "n hw"),
    "linears": (Linears, ROWS, "tensorrt", ""),
    "linears-onnxruntime": (Linears, ROWS, "onnxruntime", ""),
    "encoder-dynamic": (Encoder, TOKENS, "tensorrt", "n"),
    "encoder-onnxruntime": (Encoder, TOKENS, "onnxruntime", ""),
    "multihead-attention": (Attention, TOKENS, "tensorrt", ""),
}


@dataclasses.dataclass(frozen=True)
class Both:
    """One model and its files by both of torch's exporters."""

    model: nn.Module
    x: Tensor
    torchscript: ExportReport
    torch_export: ExportReport

    def of_both(self, function):
        return function(self.torchscript), function(self.torch_export)


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory) -> Both:
    torch.manual_seed(0)
    make, shape, target, dynamic = CASES[request.param]
    model, x, folder = make().eval(), torch.randn(shape), tmp_path_factory.mktemp("both")
    fq.quantize(model, example_inputs=x, target=target)
    fq.calibrate(model, [x], progress=False)
    shapes = ({axis: torch.export.Dim(name) for axis, name in enumerate(dynamic) if name != " "},)
    reports = [
        fq.export_onnx(model, (x,), folder / f"{opset}.onnx", target=target, opset=opset, dynamic_shapes=shapes)
        for opset in (TORCHSCRIPT, TORCH_EXPORT)
    ]
    return Both(model, x, *reports)


MOVES_DATA = {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def readers(value: ir.Value) -> list[tuple[str, str]]:
    """Return op and module of what computes with a value, behind ops that only move data."""
    found = []
    for node in value.consumers():
        if node.op_type in MOVES_DATA:
            found += [reader for output in node.outputs for reader in readers(output)]
        else:
            found.append((node.op_type, node.metadata_props.get("fakequant.module", "")))
    return sorted(found)


def edges(report: ExportReport) -> Counter:
    """Return every Q and DQ: of which quantizer and call, its parameters and codes, and who reads it."""
    found = Counter()
    for node in ir.load(report.path).graph:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            names = [node.metadata_props.get(key) for key in ("fakequant.quantizer", "fakequant.call")]
            constants = [constant_of(value) for value in node.inputs]
            values = [None if c is None else (c.dtype.str, c.shape, c.tobytes()) for c in constants]
            axis = node.attributes.get_int("axis", None)
            found[(node.op_type, *names, *values, axis, *readers(node.outputs[0]))] += 1
    return found


def test_the_q_and_dq_are_the_same(both):
    torchscript, torch_export = both.of_both(edges)
    assert torchscript == torch_export
    assert len(torchscript) >= 10


def output(report: ExportReport, x: Tensor, optimized: bool) -> np.ndarray:
    session = Session(report.path, optimized=optimized)
    (array,) = session.run({"x": x.numpy()}).values()
    return array


@pytest.mark.parametrize("optimized", [False, True], ids=["simulated", "optimized"])
def test_onnxruntime_computes_the_same(both, optimized):
    torchscript, torch_export = both.of_both(lambda report: output(report, both.x, optimized))
    np.testing.assert_allclose(torchscript, torch_export, rtol=0, atol=1e-5 * np.abs(torch_export).max())


def test_onnxruntime_has_as_many_integer_kernels(both, integer_ops):
    torchscript, torch_export = both.of_both(lambda report: integer_ops(report.path).total())
    assert torchscript == torch_export


@pytest.mark.parametrize("file", ["torchscript", "torch_export"])
def test_the_file_computes_what_torch_does(both, file):
    found = fq.validate_onnx(getattr(both, file).path, both.model, [both.x])
    assert found.simulated.max_steps <= 1
    assert found.optimized.max_steps <= 2


@pytest.mark.parametrize(
    "field", ["target", "quantizers", "not_in_file", "integer_weights", "folded_batchnorms", "kept_batchnorms"]
)
def test_the_reports_say_the_same(both, field):
    torchscript, torch_export = both.of_both(lambda report: getattr(report, field))
    assert torchscript == torch_export


def test_the_same_ops_stay_float(both):
    # A node of the root module has no module to be named after: its own name is the exporter's.
    torchscript, torch_export = both.of_both(lambda report: sorted(report.float_ops.values()))
    assert torchscript == torch_export


def values(report: ExportReport) -> tuple[list, list]:
    graph = ir.load(report.path).graph
    return [(v.name, v.dtype) for v in graph.inputs], [v.dtype for v in graph.outputs]


def test_inputs_and_outputs_are_the_same(both):
    torchscript, torch_export = both.of_both(values)
    assert torchscript == torch_export


def parameters(report: ExportReport, model: nn.Module) -> set[int]:
    """Return the addresses of the tensors of a model whose name, or one of whose names, is in the file."""
    names = set(ir.load(report.path).graph.initializers)
    state = model.state_dict().items()
    return {tensor.data_ptr() for name, tensor in state if name in names or f"{name}.codes" in names}


def test_parameters_keep_their_names(both):
    torchscript, torch_export = both.of_both(lambda report: parameters(report, both.model))
    assert torchscript == torch_export
    assert torchscript
