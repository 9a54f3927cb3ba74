"""ONNX Runtime sessions. This is the only file that opens one."""

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from fakequant.errors import InvalidValueError, ValidationError
from fakequant.export.kernels import INTEGER_OPS

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INSTALL = {"cuda": "pip install onnxruntime-gpu"}


@dataclasses.dataclass(frozen=True)
class OptimizedNode:
    """A node of the graph that ONNX Runtime runs."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Session:
    """A file loaded by ONNX Runtime.

    Args:
        path: of the file.
        provider: ``"cpu"`` or ``"cuda"``.
        optimized: with all graph optimizations (integer kernels), or with none (every Q and DQ runs as written).
        num_threads: threads within an op; 0 for all cores.

    Raises:
        InvalidValueError: unknown provider.
        ValidationError: the provider is not installed (says what to install), or the file cannot be loaded.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, provider: str = "cpu", optimized: bool = True, num_threads: int = 0
    ) -> None:
        self.path = Path(path)
        with tempfile.TemporaryDirectory(prefix="fakequant-") as folder:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = num_threads
            level = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
            dump = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(dump)
            self._session = _open(self.path, options, _available(provider))
            self.nodes = _nodes(dump)
        self.op_counts = Counter(node.op_type for node in self.nodes)
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name.

        Raises:
            ValidationError: an input does not fit the file.
        """
        try:
            return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:  # onnxruntime raises its own types, unrelated to each other
            shapes = {name: tuple(np.shape(array)) for name, array in feeds.items()}
            raise ValidationError(f"{self.path}: expected inputs {self.inputs}, got {shapes}: {error}") from error

    @property
    def integer_ops(self) -> int:
        """How many weighted layers compute in integers."""
        return sum(count for op_type, count in self.op_counts.items() if op_type in INTEGER_OPS)


def _available(provider: str) -> Sequence[str]:
    if provider not in _PROVIDERS:
        raise InvalidValueError(f"provider: expected one of {sorted(_PROVIDERS)}, got {provider!r}")
    name = _PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise ValidationError(
            f"provider {provider!r}: expected {name} in onnxruntime {onnxruntime.__version__}, got "
            f"{onnxruntime.get_available_providers()}. Run: {_INSTALL[provider]}"
        )
    return [name] if provider == "cpu" else [name, _PROVIDERS["cpu"]]


def _open(path: Path, options: onnxruntime.SessionOptions, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise ValidationError(f"{path}: expected an ONNX file, got none there")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # onnxruntime raises its own types, unrelated to each other
        raise ValidationError(f"{path}: onnxruntime cannot load it: {error}") from error
    if session.get_providers()[0] != providers[0]:
        raise ValidationError(f"{path}: expected {providers[0]} to start, got {session.get_providers()}")
    return session


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
