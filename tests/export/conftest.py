"""Quantized models, their files, and ways to look into a file."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import ExportReport, Session, runtime
from fakequant.export.graph import QUANTIZER_KEY, constant_of


@dataclasses.dataclass(frozen=True)
class Exported:
    """A quantized model and its file."""

    model: nn.Module
    args: tuple[Tensor, ...]
    path: Path
    report: ExportReport

    @property
    def graph(self) -> ir.Graph:
        return ir.load(self.path).graph

    def nodes(self, op_type: str) -> list[ir.Node]:
        return [node for node in self.graph if node.op_type == op_type]

    def quantizer(self, name: str, op_type: str = "DequantizeLinear") -> ir.Node:
        """Return the one node of a quantizer."""
        (node,) = [n for n in self.nodes(op_type) if name in n.metadata_props[QUANTIZER_KEY].split("\n")]
        return node

    def weight(self, layer: str = "") -> tuple[np.ndarray, np.ndarray, int | None]:
        """Return codes, scale and axis of a layer's stored weight."""
        node = self.quantizer(f"{layer}._weight_quantizer".lstrip("."))
        axis = node.attributes.get_int("axis", None)
        return constant_of(node.inputs[0]), constant_of(node.inputs[1]), axis

    def run(self, *args: Tensor, optimized: bool = False) -> list[np.ndarray]:
        session = Session(self.path, optimized=optimized)
        return list(
            session.run(dict(zip(session.inputs, (a.numpy() for a in args or self.args), strict=True))).values()
        )

    def validate(self, **options) -> fq.export.ValidationReport:
        return fq.validate_onnx(self.path, self.model, [self.args], inputs=lambda args: args, **options)


def quantized(model: nn.Module, *args: Tensor, recipe: str | fq.Recipe = "int8") -> nn.Module:
    """Quantize a model and calibrate it on one batch."""
    model.eval()
    fq.quantize(model, recipe)
    fq.calibrate(model, [args], progress=False, forward=lambda model, args: model(*args))
    return model


def randomize_batchnorm(model: nn.Module, x: Tensor) -> None:
    """Give every BatchNorm the statistics of a batch and random parameters, with a negative and a zero gamma."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.normal_(norm.weight, 1.0, 0.5)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        norm.weight.data[:2] = torch.tensor([0.0, -0.7])
    model.train()(x)
    model.eval()


class Residual(nn.Module):
    """Convolutions of every kind that BatchNorm folds into, around a skip connection, [N, 3, 8, 8] to [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn3 = nn.BatchNorm2d(8, eps=1e-3)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn4 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = self.bn2(self.grouped(x)).relu() + x
        x = self.bn3(self.depthwise(x)).relu()
        x = self.bn4(self.up(x)).relu()
        return self.fc(x.mean((2, 3)))


def residual(recipe: str | fq.Recipe = "int8") -> tuple[nn.Module, Tensor]:
    """Return a quantized Residual and the batch it was calibrated on."""
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    randomize_batchnorm(model, x)
    return quantized(model, x, recipe=recipe), x


@pytest.fixture
def export(tmp_path) -> Callable[..., Exported]:
    """Quantize a float model on example inputs and export it."""

    def run(model: nn.Module, *args: Tensor, recipe: str | fq.Recipe = "int8", **options) -> Exported:
        path = tmp_path / "model.onnx"
        quantized(model, *args, recipe=recipe)
        return Exported(model, args, path, fq.export_onnx(model, args, path, **options))

    return run


@pytest.fixture(name="quantized")
def _quantized() -> Callable[..., nn.Module]:
    return quantized


@pytest.fixture(scope="session")
def cnn(tmp_path_factory) -> Exported:
    """The residual CNN, exported once; do not change it."""
    model, x = residual()
    path = tmp_path_factory.mktemp("cnn") / "cnn.onnx"
    return Exported(model, (x,), path, fq.export_onnx(model, (x,), path))


@pytest.fixture(scope="session")
def float_cnn(tmp_path_factory) -> Exported:
    """The same CNN with float weights, exported once."""
    model, x = residual()
    path = tmp_path_factory.mktemp("cnn") / "float.onnx"
    return Exported(model, (x,), path, fq.export_onnx(model, (x,), path, weights="float"))


@pytest.fixture
def fresh_cnn() -> tuple[nn.Module, Tensor]:
    """A residual CNN of one's own, quantized and calibrated, and its batch."""
    return residual()


@pytest.fixture
def cuda_that_takes_nothing(monkeypatch) -> None:
    """A provider in place of CUDA that is there and takes no node."""
    name = "AzureExecutionProvider"
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {name}")
    monkeypatch.setitem(runtime._PROVIDERS, "cuda", dataclasses.replace(runtime._PROVIDERS["cuda"], name=name))


def _optimized_ops(path: Path) -> Counter[str]:
    """Count the ops of the graph that ONNX Runtime runs; knows nothing of fakequant."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def _integer_ops(path: Path) -> Counter[str]:
    """Count the kernels among them that only compute in integers."""
    others = {"MatMulIntegerToFloat", "MatMulNBits", "NhwcMaxPool", "QGemm"}
    ops = _optimized_ops(path)
    return Counter({name: ops[name] for name in ops if name.startswith("QLinear") or name in others})


@pytest.fixture(scope="session")
def optimized_ops() -> Callable[[Path], Counter[str]]:
    return _optimized_ops


@pytest.fixture(scope="session")
def integer_ops() -> Callable[[Path], Counter[str]]:
    return _integer_ops
