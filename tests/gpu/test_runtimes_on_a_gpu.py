"""Files on a GPU: ONNX Runtime's CUDA and TensorRT providers, the ``tensorrt`` package, trtexec."""

import importlib.util
import shlex
import shutil
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import Session, TensorrtEngine, open_session, tensorrt_command

pytestmark = pytest.mark.gpu

X = torch.rand(4, 32, 16, 16, generator=torch.Generator().manual_seed(0))


def needs_provider(name: str) -> pytest.MarkDecorator:
    there = name in onnxruntime.get_available_providers()
    return pytest.mark.skipif(not there, reason=f"needs an onnxruntime with {name}")


needs_cuda = needs_provider("CUDAExecutionProvider")
needs_tensorrt_provider = needs_provider("TensorrtExecutionProvider")
needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="needs the package tensorrt")
needs_trtexec = pytest.mark.skipif(shutil.which("trtexec") is None, reason="needs trtexec")


class Net(nn.Module):
    """Two convolutions around a residual add, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.two(F.relu(self.one(x))) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export the network for a target."""
    torch.manual_seed(0)
    model = Net().eval()
    fq.quantize(model, example_inputs=X)
    fq.calibrate(model, [X], progress=False)

    def run(target: str, **options):
        path = tmp_path_factory.mktemp("gpu") / "m.onnx"
        fq.export_onnx(model, (X,), path, target=target, input_names=["x"], **options)
        return path

    return run


def sqnr(session, path) -> float:
    """Return how far a session is from the file as written, on the CPU, in dB."""
    feeds = {"x": X.numpy()}
    (expected,), (got,) = (list(one.run(feeds).values()) for one in (Session(path, optimized=False), session))
    return 10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum())


@needs_cuda
@pytest.mark.parametrize("optimized", [False, True])
def test_cuda_runs_every_q_and_dq_itself(export, optimized):
    path = export("onnxruntime-cuda")
    session = Session(path, provider="cuda", optimized=optimized)
    assert sqnr(session, path) >= 40
    assert not {"QuantizeLinear", "DequantizeLinear", "Conv"} & {one.op_type for one in session.fallbacks}


@needs_tensorrt_provider
def test_the_tensorrt_provider_computes_the_same(export):
    path = export("tensorrt-ep")
    session = Session(path, provider="tensorrt")
    assert sqnr(session, path) >= 40
    assert session.fallbacks == ()


@needs_tensorrt
@pytest.mark.parametrize(
    "options", [{}, {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}], ids=["static", "dynamic"]
)
def test_tensorrt_computes_the_same_in_integers(export, options):
    path = export("tensorrt", **options)
    engine = open_session(path, provider="tensorrt")
    assert isinstance(engine, TensorrtEngine)
    assert sqnr(engine, path) >= 40
    assert engine.integer_ops >= 2
    assert all(layer.milliseconds is None or layer.milliseconds >= 0 for layer in engine.layers)
    assert sum(layer.milliseconds or 0.0 for layer in engine.layers) > 0


@needs_tensorrt
def test_tensorrts_parser_refuses_what_check_onnx_calls_an_error(export):
    path = export("onnxruntime")
    assert {finding.rule for finding in fq.check_onnx(path).errors} & {"R1", "R2"}
    with pytest.raises(fq.ValidationError, match="refuses it"):
        TensorrtEngine(path)


@needs_trtexec
@needs_tensorrt
def test_trtexec_takes_the_line(export, tmp_path):
    import tensorrt

    version = int(tensorrt.__version__.split(".")[0])
    path = export("tensorrt", weights="int8" if version >= 10 else "float")
    line = tensorrt_command(path, version=version, engine=tmp_path / "m.plan")
    subprocess.run(shlex.split(line), check=True, capture_output=True)
    assert (tmp_path / "m.plan").stat().st_size
