"""Sessions: types of inputs, what ran on the CPU, providers that are not there."""

import json
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import fakequant as fq
from fakequant.export import Session, open_session
from fakequant.export.runtime import Fallback, on_cpu

NODES = """
<ir_version: 9, opset_import: ["": 19]>
g (float[2, 4] x, float16[N] h, int64[1] i, bool[1] b) => (float[2, 4] y, float16[N] k, int64[1] j, bool[1] c)
{ a = Relu(x) y = Neg(a) k = Identity(h) j = Abs(i) c = Not(b) }
"""
FEEDS = {
    "x": np.zeros((2, 4), np.float32),
    "h": np.zeros(3, np.float16),
    "i": np.zeros(1, np.int64),
    "b": np.zeros(1, np.bool_),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(NODES), path)
    return path


def test_a_session_knows_the_types_of_its_inputs(file):
    assert Session(file).input_dtypes == {name: array.dtype for name, array in FEEDS.items()}


def test_on_the_cpu_nothing_falls_back(file):
    session = Session(file)
    session.run(FEEDS)
    assert session.fallbacks == ()


@pytest.mark.usefixtures("cuda_that_takes_nothing")
def test_what_ran_on_the_cpu_is_known_after_the_first_run(file):
    session = Session(file, provider="cuda", optimized=False)
    assert session.fallbacks == ()
    session.run(FEEDS)
    expected = [fallback.op_type for fallback in session.fallbacks]
    assert sorted(expected) == ["Abs", "Identity", "Neg", "Not", "Relu"]
    session.run(FEEDS)
    assert [fallback.op_type for fallback in session.fallbacks] == expected


@pytest.mark.usefixtures("cuda_that_takes_nothing")
def test_profiles_leave_nothing_behind(file, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = Session(file, provider="cuda")
    session.run(FEEDS)
    assert list(tmp_path.glob("fakequant-*"))
    del session
    assert not list(tmp_path.glob("fakequant-*"))


def event(name: str, op_type: str, provider: str, cat: str = "Node") -> dict:
    return {"cat": cat, "name": f"{name}_kernel_time", "args": {"op_name": op_type, "provider": provider}}


def test_a_profile_tells_the_nodes_on_the_cpu_apart():
    profile = [
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Session", "name": "no args"},
        event("conv", "Conv", "CUDAExecutionProvider"),
        event("shape_of", "Shape", "CPUExecutionProvider"),
        event("shape_of", "Shape", "CPUExecutionProvider"),
        event("gemm", "Kernel", "CPUExecutionProvider", cat="Kernel"),
        event("", "Gather", "CPUExecutionProvider"),
    ]
    found = on_cpu(json.dumps(profile))
    assert found == (Fallback("Shape", "shape_of"), Fallback("Gather", ""))
    assert [str(fallback) for fallback in found] == ["shape_of (Shape)", "Gather"]


def test_a_real_profile(file, tmp_path):
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session.run(None, FEEDS)
    with open(session.end_profiling(), encoding="utf-8") as profile:  # noqa: PTH123 a path that is a str
        assert sorted(found.op_type for found in on_cpu(profile.read())) == ["Abs", "Identity", "Neg", "Not", "Relu"]


@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_missing_provider_says_what_to_install(file, provider, name, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    words = rf"provider '{provider}': expected {name}ExecutionProvider in .*\. Run: pip install onnxruntime-gpu"
    with pytest.raises(fq.ValidationError, match=words):
        Session(file, provider=provider)


def test_a_provider_that_does_not_start(file, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    # What ONNX Runtime does where the libraries of CUDA are missing: a warning, and the next provider.
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: Started(path, options))
    with pytest.raises(fq.ValidationError, match="expected CUDAExecutionProvider to start, got"):
        Session(file, provider="cuda")


class Started(onnxruntime.InferenceSession):
    """A session that got only the CPU."""

    def __init__(self, path, options) -> None:
        super().__init__(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("opened", [Session, open_session])
def test_an_unknown_provider(file, opened):
    with pytest.raises(
        fq.InvalidValueError, match=r"provider: expected one of \['cpu', 'cuda', 'tensorrt'\], got 'tpu'"
    ):
        opened(file, provider="tpu")


@pytest.mark.parametrize("opened", [Session, open_session])
@pytest.mark.parametrize(("content", "words"), [(None, "got none there"), (b"no ONNX", "cannot load it")])
def test_what_is_no_onnx_file(tmp_path, opened, content, words):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(fq.ValidationError, match=words):
        opened(tmp_path / "m.onnx")


@pytest.mark.parametrize("optimized", [True, False])
def test_open_session_opens_the_provider(file, optimized):
    session = open_session(file, optimized=optimized)
    assert isinstance(session, Session)
    assert session.run(FEEDS)["y"].shape == (2, 4)


def test_the_file_as_written_is_run_on_the_cpu_for_tensorrt(file):
    session = open_session(file, provider="tensorrt", optimized=False)
    assert isinstance(session, Session)
    assert session.op_counts["Relu"] == 1


@pytest.mark.parametrize(("spec", "expected"), [(object(), "package"), (None, "provider")])
def test_the_package_comes_before_the_provider(file, monkeypatch, spec, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    module = sys.modules["fakequant.export.open_session"]
    monkeypatch.setattr(module, "TensorrtEngine", lambda path: "package")
    monkeypatch.setattr(module, "Session", lambda path, provider: "provider")
    assert open_session(file, provider="tensorrt") == expected


def test_tensorrt_without_package_or_provider(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(fq.ValidationError, match="Run: pip install onnxruntime-gpu tensorrt"):
        open_session(file, provider="tensorrt")
