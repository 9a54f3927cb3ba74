"""ONNX Runtime sessions. This is the only file that opens one."""

import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from fakequant.errors import InvalidValueError, ValidationError
from fakequant.export.engine_layers import EngineLayer
from fakequant.export.graph import FLOAT8, FLOAT_DTYPE_KEY
from fakequant.export.kernels import INTEGER_OPS

_CPU = "CPUExecutionProvider"

_WRONG_IN_HALF = "WeightBiasQuantization"
"""An optimizer of ONNX Runtime that computes the scales of biases in float16, where they become 0 (seen in 1.31)."""

_WRONG_IN_FLOAT8 = "QDQSelectorActionTransformer;Level2_RuleBasedTransformer"
"""Those that make integer kernels of FP8 products, and drop a Relu in front of an FP8 Q (seen in 1.31)."""


@dataclasses.dataclass(frozen=True)
class _Provider:
    """A provider of ONNX Runtime.

    Args:
        name: in ONNX Runtime.
        behind: the providers that take what it leaves.
        install: the command that installs it.
        options: as ONNX Runtime takes them.
        compiles: whether it makes one node of many, so that the optimized graph cannot be saved.
    """

    name: str
    behind: tuple[str, ...] = ()
    install: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiles: bool = False


# With neither int8 nor fp16 enabled, the provider (from TensorRT 10 on) builds a strongly typed
# engine: Q/DQ as in the file and nothing else in less than its own type. Either flag would let
# TensorRT choose types by itself, and there is none for TensorRT 11 to take.
_AS_IN_THE_FILE = {"trt_int8_enable": "0", "trt_fp16_enable": "0", "trt_engine_cache_enable": "0"}

_PROVIDERS = {
    "cpu": _Provider(_CPU),
    "cuda": _Provider("CUDAExecutionProvider", (_CPU,), "pip install onnxruntime-gpu"),
    "tensorrt": _Provider(
        "TensorrtExecutionProvider",
        ("CUDAExecutionProvider", _CPU),
        "pip install onnxruntime-gpu tensorrt",
        _AS_IN_THE_FILE,
        compiles=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class OptimizedNode:
    """A node of the graph that ONNX Runtime runs."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A node that ran on the CPU in place of the provider that was asked for."""

    op_type: str
    name: str

    def __str__(self) -> str:
        """Return the name, or the op of a node without one."""
        return f"{self.name} ({self.op_type})" if self.name else self.op_type


class Session:
    """A file loaded by ONNX Runtime.

    Args:
        path: of the file.
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``, the TensorRT provider; what that leaves runs on
            CUDA, what CUDA leaves on the CPU.
        optimized: with all graph optimizations (integer kernels), or with none (every Q and DQ runs as written).
        num_threads: threads within an op; 0 for all cores.

    Attributes:
        path: of the file.
        nodes: of the graph that runs; () for ``"tensorrt"``, whose engine does not say.
        inputs: {name: shape}.
        input_dtypes: {name: type}; only of tensors.
        outputs: names.
        fallbacks: what ran on the CPU in the first run; () before it, and for ``"cpu"``.
        layers: (); only the ``tensorrt`` package tells them.

    Raises:
        InvalidValueError: unknown provider.
        ValidationError: the provider is not installed (says what to install), or the file cannot be loaded.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, provider: str = "cpu", optimized: bool = True, num_threads: int = 0
    ) -> None:
        self.path = Path(path)
        chosen = _available(provider)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = num_threads
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        self._compiles, self._is_profiled = chosen.compiles, bool(chosen.behind)
        if self._is_profiled:
            # Where each node runs, ONNX Runtime says only in the profile of a run.
            folder = tempfile.mkdtemp(prefix="fakequant-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        self._session, self.nodes = _open(self.path, options, chosen)
        self.op_counts = Counter(node.op_type for node in self.nodes)
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.input_dtypes = {
            value.name: _dtype(value.type) for value in self._session.get_inputs() if value.type.startswith("tensor(")
        }
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.fallbacks: tuple[Fallback, ...] = ()
        self.layers: tuple[EngineLayer, ...] = ()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name.

        Raises:
            ValidationError: an input does not fit the file.
        """
        try:
            outputs = self._session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            shapes = {name: tuple(np.shape(array)) for name, array in feeds.items()}
            raise ValidationError(f"{self.path}: expected inputs {self.inputs}, got {shapes}: {error}") from error
        if self._is_profiled:
            self._is_profiled = False
            self.fallbacks = on_cpu(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return dict(zip(self.outputs, outputs, strict=True))

    @property
    def integer_ops(self) -> int | None:
        """How many weighted layers compute in integers; None for ``"tensorrt"``, whose engine does not say."""
        if self._compiles:
            return None
        return sum(count for op_type, count in self.op_counts.items() if op_type in INTEGER_OPS)


def on_cpu(profile: str) -> tuple[Fallback, ...]:
    """Return the nodes that a profile of ONNX Runtime says ran on the CPU, each once, in order."""
    found: dict[Fallback, None] = {}
    for event in json.loads(profile):
        details = event.get("args", {})
        if event.get("cat") == "Node" and details.get("provider") == _CPU:
            found[Fallback(details["op_name"], event["name"].removesuffix("_kernel_time"))] = None
    return tuple(found)


def _available(provider: str) -> _Provider:
    if provider not in _PROVIDERS:
        raise InvalidValueError(f"provider: expected one of {sorted(_PROVIDERS)}, got {provider!r}")
    chosen, there = _PROVIDERS[provider], onnxruntime.get_available_providers()
    if chosen.name not in there:
        raise ValidationError(
            f"provider {provider!r}: expected {chosen.name} in onnxruntime {onnxruntime.__version__}, got {there}. "
            f"Run: {chosen.install}"
        )
    return chosen


def _open(
    path: Path, options: onnxruntime.SessionOptions, provider: _Provider
) -> tuple[onnxruntime.InferenceSession, tuple[OptimizedNode, ...]]:
    """Return a session and the nodes of its graph, of one that can be saved."""
    if not path.is_file():
        raise ValidationError(f"{path}: expected an ONNX file, got none there")
    with tempfile.TemporaryDirectory(prefix="fakequant-") as folder:
        dump = Path(folder) / "optimized.onnx"
        if not provider.compiles:
            options.optimized_model_filepath = str(dump)
        providers = [(provider.name, dict(provider.options)), *provider.behind]
        try:
            options.add_session_config_entry("optimization.disable_specified_optimizers", _wrong_optimizers(path))
            session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            raise ValidationError(f"{path}: onnxruntime cannot load it: {error}") from error
        if session.get_providers()[0] != provider.name:
            raise ValidationError(
                f"{path}: expected {provider.name} to start, got {session.get_providers()}. A library of it or the "
                "GPU is missing; ONNX Runtime printed which"
            )
        return session, () if provider.compiles else _nodes(dump)


def _wrong_optimizers(path: Path) -> str:
    """Return the optimizers of ONNX Runtime that make something else of a file than it says."""
    model = ir.load(path)
    in_half = FLOAT_DTYPE_KEY in model.metadata_props
    in_float8 = any(value.dtype in FLOAT8 for value in model.graph.initializers.values())
    return ";".join(names for names, applies in ((_WRONG_IN_HALF, in_half), (_WRONG_IN_FLOAT8, in_float8)) if applies)


def _nodes(path: Path) -> tuple[OptimizedNode, ...]:
    """Return the nodes of a file, those of branches and loop bodies with them."""
    return tuple(
        OptimizedNode(
            node.op_type,
            node.name or "",
            tuple((value.name or "") if value is not None else "" for value in node.inputs),
            tuple(value.name or "" for value in node.outputs),
        )
        for node in ir.load(path).graph.all_nodes()
    )


def _dtype(tensor_type: str) -> np.dtype[Any]:
    """Return the type of ``"tensor(float16)"``."""
    return ir.DataType[tensor_type.removeprefix("tensor(").removesuffix(")").upper()].numpy()
