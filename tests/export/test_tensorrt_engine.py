"""How an engine is built, against a stand-in for the ``tensorrt`` package with the names that its versions have.

What TensorRT does with them is tested on a GPU only (tests/gpu).
"""

import enum
import json
import sys
import types

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import fakequant as fq
from fakequant.export import TensorrtEngine

NODES = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N, 4] x) => (float[N, 4] y) <float s = {0.1}, int8 z = {0}, float[4, 4] w>
{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) [product] y = MatMul(d, w) }
""".replace("w>", "w = {" + ", ".join("1" * 16) + "}>")
LAYERS = [
    {
        "Name": "product",
        "LayerType": "gemm",
        "Inputs": [{"Format/Datatype": "Int8"}],
        "Outputs": [{"Format/Datatype": "Float"}],
        "Metadata": "[ONNX Layer: product]",
    }
]


class Recorded(types.SimpleNamespace):
    """What the engine's code did with the stand-in."""


def stand_in(version: str, recorded: Recorded, *, faults: tuple = (), plan: bytes | None = b"plan") -> types.ModuleType:
    """Return a module with what NVIDIA's documentation of a version names, as far as it is used."""
    module, major = types.ModuleType("tensorrt"), int(version.split(".", maxsplit=1)[0])
    module.__version__ = version
    flags = ["TF32"] if major >= 11 else ["TF32", "INT8", "FP16"]
    module.BuilderFlag = enum.IntEnum("BuilderFlag", flags)
    kinds = {8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"], 11: ["STRONGLY_TYPED"]}[major]
    module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", kinds, start=0)
    module.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
    module.LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
    module.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})
    module.IProfiler = type("IProfiler", (), {})
    tensor = types.SimpleNamespace
    network = types.SimpleNamespace(
        num_inputs=1,
        num_outputs=1,
        get_input=lambda index: tensor(name="x", shape=(-1, 4)),
        get_output=lambda index: tensor(name="y"),
    )
    engine = types.SimpleNamespace(
        create_execution_context=types.SimpleNamespace,
        create_engine_inspector=lambda: types.SimpleNamespace(
            get_engine_information=lambda form: json.dumps({"Layers": LAYERS})
        ),
    )

    class Parser:
        num_errors = len(faults)

        def __init__(self, network, log) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            recorded.parsed = path
            return not faults

        def get_error(self, index: int) -> object:
            return faults[index]

    class Builder:
        def __init__(self, log) -> None:
            self.log = log

        def create_network(self, flags: int) -> object:
            recorded.network = [kind.name for kind in module.NetworkDefinitionCreationFlag if flags >> int(kind) & 1]
            return network

        def create_builder_config(self) -> object:
            recorded.flags = []
            return types.SimpleNamespace(
                set_flag=lambda flag: recorded.flags.append(flag.name),
                add_optimization_profile=lambda profile: None,
            )

        def create_optimization_profile(self) -> object:
            return types.SimpleNamespace(set_shape=lambda *given: recorded.shapes.append(given))

        def build_serialized_network(self, network, config) -> bytes | None:
            recorded.verbosity = config.profiling_verbosity.name
            self.log.log(module.ILogger.ERROR, "no kernel for it")
            self.log.log(module.ILogger.WARNING, "a warning")
            return plan

    module.OnnxParser, module.Builder = Parser, Builder
    module.Runtime = lambda log: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    return module


@pytest.fixture
def path(tmp_path):
    onnx.save(onnx.parser.parse_model(NODES), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def opened(path, monkeypatch):
    """Open the file with a stand-in; return the engine and what is recorded."""

    def run(version: str = "10.9.0", **options) -> tuple[TensorrtEngine, Recorded]:
        recorded = Recorded(shapes=[])
        monkeypatch.setitem(sys.modules, "tensorrt", stand_in(version, recorded, **options))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return TensorrtEngine(path), recorded

    # The stand-in has no kernels: what goes in comes out.
    monkeypatch.setattr(TensorrtEngine, "_execute", lambda self, feeds: {"y": feeds["x"].numpy()})
    return run


def feeds(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((batch, 4), np.float32)}


@pytest.mark.parametrize(
    ("version", "network", "flags"),
    [
        ("8.6.1", ["EXPLICIT_BATCH"], ["INT8", "FP16"]),
        ("10.0.1", ["STRONGLY_TYPED"], []),
        ("11.4.0.106", ["STRONGLY_TYPED"], []),
    ],
)
def test_the_network_is_of_the_types_of_the_file_from_tensorrt_10_on(opened, path, version, network, flags):
    engine, recorded = opened(version)
    engine.run(feeds(2))
    assert (recorded.parsed, recorded.network, recorded.flags) == (str(path), network, flags)
    assert recorded.verbosity == "DETAILED"


def test_it_has_the_face_of_a_session(opened, path):
    engine, _ = opened()
    assert (engine.path, engine.inputs, engine.outputs) == (path, {"x": [-1, 4]}, ["y"])
    assert engine.input_dtypes == {"x": np.float32}
    assert engine.run(feeds(2))["y"].shape == (2, 4)


def test_an_engine_is_built_for_the_shapes_of_the_inputs_and_again_when_they_change(opened):
    engine, recorded = opened()
    assert recorded.shapes == []
    for batch in (2, 2, 3, 3):
        engine.run(feeds(batch))
    assert recorded.shapes == [("x", (2, 4), (2, 4), (2, 4)), ("x", (3, 4), (3, 4), (3, 4))]


def test_layers_are_known_after_the_first_run(opened):
    engine, _ = opened()
    assert (engine.layers, engine.integer_ops) == ((), 0)
    engine.run(feeds(2))
    assert [(layer.name, layer.precision) for layer in engine.layers] == [("product", "int8")]
    assert engine.integer_ops == 1


def test_times_of_a_layer_are_those_of_the_profiler(opened):
    engine, _ = opened()
    engine.run(feeds(2))
    engine._profiler.report_layer_time("product", 0.25)
    engine._profiler.report_layer_time("product", 0.5)
    engine.run(feeds(2))
    assert engine.layers[0].milliseconds == 0.75


class Fault:
    """An error of the parser, before TensorRT 10."""

    def desc(self) -> str:
        return "Non-zero zero point is not supported"

    def node(self) -> int:
        return 3


class NamedFault(Fault):
    """The same from TensorRT 10 on."""

    def node_name(self) -> str:
        return "layer1.conv"


@pytest.mark.parametrize(("fault", "node"), [(Fault(), "node 3"), (NamedFault(), "layer1.conv")])
def test_what_the_parser_refuses_names_the_node(opened, fault, node):
    with pytest.raises(fq.ValidationError, match=rf"m.onnx: TensorRT 10.9.0 refuses it: {node}: Non-zero zero point"):
        opened(faults=(fault,))


def test_what_cannot_be_built_says_why(opened):
    engine, _ = opened(plan=None)
    with pytest.raises(
        fq.ValidationError, match=r"cannot build an engine for inputs \{'x': \(2, 4\)\}: no kernel for it"
    ):
        engine.run(feeds(2))


@pytest.mark.parametrize(
    "given", [{}, {"x": np.ones((2, 5), np.float32)}, {"x": np.ones(4, np.float32)}], ids=["none", "size", "rank"]
)
def test_inputs_that_do_not_fit(opened, given):
    engine, _ = opened()
    with pytest.raises(fq.ValidationError, match=r"m.onnx: expected inputs \{'x': \[-1, 4\]\}, got"):
        engine.run(given)


def test_without_the_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(fq.ValidationError, match=r"expected the package tensorrt, got .*\. Run: pip install tensorrt"):
        TensorrtEngine(path)


def test_without_a_gpu(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in("10.9.0", Recorded(shapes=[])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fq.ValidationError, match="expected a CUDA device, got none"):
        TensorrtEngine(path)


def test_what_is_no_onnx_file(tmp_path):
    with pytest.raises(fq.ValidationError, match="expected an ONNX file"):
        TensorrtEngine(tmp_path / "m.onnx")
