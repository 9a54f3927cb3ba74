"""validate_onnx on providers other than the CPU, as far as a machine without a GPU can run it."""

import dataclasses
import importlib.util
import sys

import pytest

from fakequant.export import Session, runtime
from fakequant.export.engine_layers import EngineLayer

LAYER = EngineLayer("conv + relu", "CaskConvolution", "int8", "fp16", ("conv", "relu"), 0.125)


class Engine(Session):
    """Stands for a TensorRT engine: computes on the CPU."""

    integer_ops = 3

    def __init__(self, path) -> None:
        super().__init__(path)
        self.layers = (LAYER,)


@pytest.fixture
def engine(monkeypatch):
    """Stand for the ``tensorrt`` package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sys.modules["fakequant.export.open_session"], "TensorrtEngine", Engine)


@pytest.mark.usefixtures("cuda_that_takes_nothing")
def test_what_falls_back_to_the_cpu_is_named(cnn):
    report = cnn.validate(provider="cuda")
    named = {str(fallback) for fallback in report.fallbacks}
    assert any(name.endswith("(QuantizeLinear)") for name in named)
    line = str(report).splitlines()[-1]
    assert line.startswith(f"  {len(report.fallbacks)} nodes fell back to CPU: ")
    assert all(name in line for name in named)


def test_on_the_cpu_nothing_is_said_of_it(cnn):
    report = cnn.validate()
    assert (report.fallbacks, report.layers) == ((), ())
    assert "fell back" not in str(report)


@pytest.mark.usefixtures("engine")
def test_an_engine_is_compared_end_to_end_and_the_file_as_written_at_every_quantizer(cnn):
    report = cnn.validate(provider="tensorrt")
    assert report.simulated.max_steps <= 1
    assert report.optimized.max_steps is None
    assert report.optimized.sqnr_db >= 20


@pytest.mark.usefixtures("engine")
def test_the_layers_of_an_engine_are_listed(cnn):
    report = cnn.validate(provider="tensorrt")
    assert (report.layers, report.integer_ops) == ((LAYER,), 3)
    assert str(report).splitlines()[-1] == "    0.125 ms  int8 to fp16   CaskConvolution  conv + relu"


def test_a_provider_that_does_not_tell_its_kernels_says_so(file_on_a_compiling_provider):
    session, report = file_on_a_compiling_provider
    assert session.integer_ops is None
    assert "an unknown number of 5 quantized ops" in str(report)


@pytest.fixture
def file_on_a_compiling_provider(cnn, monkeypatch):
    """A session on what stands for the TensorRT provider, and a validation there."""
    provider = dataclasses.replace(runtime._PROVIDERS["tensorrt"], name="CPUExecutionProvider", behind=(), options={})
    monkeypatch.setitem(runtime._PROVIDERS, "tensorrt", provider)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return Session(cnn.path, provider="tensorrt"), cnn.validate(provider="tensorrt")
