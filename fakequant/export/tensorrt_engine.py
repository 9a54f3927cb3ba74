"""A file built and run by the ``tensorrt`` package, 8.5 to 11, on tensors of torch.

From TensorRT 10 on the network is strongly typed: Q/DQ as in the file, and the rest in the
types of the file. TensorRT 8 and 9 build it with INT8 and FP16 allowed, as ``trtexec --int8
--fp16`` does; float layers may then run in half precision (rule R20). Written against
NVIDIA's documentation and run nowhere yet by us.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fakequant.errors import ValidationError
from fakequant.export.engine_layers import EngineLayer, read_layers
from fakequant.export.kernels import WEIGHTED
from fakequant.export.load import load_model
from fakequant.export.runtime import Fallback

_TORCH_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""{name of a tensorrt.DataType: type}."""

Shapes = dict[str, tuple[int, ...]]


class TensorrtEngine:
    """A file as an engine of TensorRT.

    The engine is built at the first run, for the shapes of its inputs, and again when they change.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        inputs: {name: shape}, with -1 for a dimension that the file leaves open.
        input_dtypes: {name: type}.
        outputs: names.
        fallbacks: (); TensorRT refuses what it cannot run.
        layers: of the engine, with the times of the last run; () before the first.

    Raises:
        ValidationError: the package or a CUDA device is missing (says what to install), the file cannot be
            read, or TensorRT's parser refuses it (names the nodes).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        graph = load_model(path).graph
        self._weighted = [node.name or "" for node in graph.all_nodes() if node.op_type in WEIGHTED]
        self._trt = _tensorrt()
        self._log = _log(self._trt)
        self._builder = self._trt.Builder(self._log)
        self._network = self._parsed()
        inputs = [self._network.get_input(index) for index in range(self._network.num_inputs)]
        self.inputs = {tensor.name: list(tensor.shape) for tensor in inputs}
        self.input_dtypes = {
            str(value.name): value.dtype.numpy()
            for value in graph.inputs
            if value.name in self.inputs and value.dtype is not None
        }
        self.outputs = [self._network.get_output(index).name for index in range(self._network.num_outputs)]
        self.fallbacks: tuple[Fallback, ...] = ()
        self.layers: tuple[EngineLayer, ...] = ()
        self._shapes: Shapes | None = None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name.

        Raises:
            ValidationError: an input is missing or does not fit the file; TensorRT cannot build or run the engine.
        """
        shapes = self._checked(feeds)
        if shapes != self._shapes:
            self._build(shapes)
        outputs = self._execute({name: torch.tensor(feeds[name]) for name in self.inputs})
        information = self._engine.create_engine_inspector().get_engine_information(
            self._trt.LayerInformationFormat.JSON
        )
        self.layers = read_layers(information, self._milliseconds)
        return outputs

    @property
    def integer_ops(self) -> int:
        """How many weighted nodes of the file are in a layer that reads int8; 0 before the first run."""
        integers = {node for layer in self.layers if layer.precision == "int8" for node in layer.nodes}
        return sum(name in integers for name in self._weighted)

    def _parsed(self) -> Any:
        flags = self._trt.NetworkDefinitionCreationFlag
        flag = flags.STRONGLY_TYPED if _major(self._trt) >= 10 else flags.EXPLICIT_BATCH
        network = self._builder.create_network(1 << int(flag))
        # Kept, because the weights of the network are the parser's.
        self._parser = self._trt.OnnxParser(network, self._log)
        # From the file, so that external data beside it is found.
        if not self._parser.parse_from_file(str(self.path)):
            found = [_described(self._parser.get_error(index)) for index in range(self._parser.num_errors)]
            raise ValidationError(f"{self.path}: TensorRT {self._trt.__version__} refuses it: {'; '.join(found)}")
        return network

    def _checked(self, feeds: Mapping[str, NDArray[Any]]) -> Shapes:
        shapes = {name: tuple(np.shape(feeds[name])) for name in self.inputs if name in feeds}
        fits = len(shapes) == len(self.inputs) and all(
            len(shapes[name]) == len(expected)
            and all(size in (-1, got) for size, got in zip(expected, shapes[name], strict=True))
            for name, expected in self.inputs.items()
        )
        if not fits:
            raise ValidationError(f"{self.path}: expected inputs {self.inputs}, got {shapes}")
        return shapes

    def _build(self, shapes: Shapes) -> None:
        config = self._builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        if _major(self._trt) < 10:
            config.set_flag(self._trt.BuilderFlag.INT8)
            config.set_flag(self._trt.BuilderFlag.FP16)
        dynamic = [name for name, shape in self.inputs.items() if -1 in shape]
        if dynamic:
            profile = self._builder.create_optimization_profile()
            for name in dynamic:
                profile.set_shape(name, shapes[name], shapes[name], shapes[name])
            config.add_optimization_profile(profile)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise ValidationError(
                f"{self.path}: TensorRT {self._trt.__version__} cannot build an engine for inputs {shapes}: "
                f"{self._log.last_error}"
            )
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            raise ValidationError(f"{self.path}: TensorRT cannot load the engine: {self._log.last_error}")
        self._milliseconds: dict[str, float] = {}
        # Kept, because the context does not own it.
        self._profiler = self._context.profiler = _profiler(self._trt, self._milliseconds)
        self._shapes = shapes

    def _execute(self, feeds: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        tensors = {name: feed.to("cuda", self._torch_type(name)).contiguous() for name, feed in feeds.items()}
        for name, tensor in tensors.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if -1 in shape:
                raise ValidationError(
                    f"{self.path}: {name}: expected a shape that the inputs' shapes tell, got {shape}"
                )
            tensors[name] = torch.empty(shape, dtype=self._torch_type(name), device="cuda")
        for name, tensor in tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._milliseconds.clear()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ValidationError(f"{self.path}: TensorRT cannot run the engine: {self._log.last_error}")
        stream.synchronize()
        return {name: _array(tensors[name]) for name in self.outputs}

    def _torch_type(self, name: str) -> torch.dtype:
        return _TORCH_TYPES[self._engine.get_tensor_dtype(name).name]


def _tensorrt() -> Any:
    """Return the package."""
    try:
        import tensorrt
    except ImportError as error:
        raise ValidationError(
            f"provider 'tensorrt': expected the package tensorrt, got {error}. Run: pip install tensorrt"
        ) from error
    if not torch.cuda.is_available():
        raise ValidationError("provider 'tensorrt': expected a CUDA device, got none that torch can use")
    return tensorrt


def _major(trt: Any) -> int:
    return int(trt.__version__.split(".")[0])


def _described(error: Any) -> str:
    """Return what the parser says, with the node's name where it tells it (from TensorRT 10 on), or its number."""
    node = error.node_name() if hasattr(error, "node_name") else f"node {error.node()}"
    return f"{node}: {error.desc()}"


def _log(trt: Any) -> Any:
    """Return a logger that keeps the last error: TensorRT raises nothing when it cannot build."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last_error = message

    return Log()


def _profiler(trt: Any, milliseconds: dict[str, float]) -> Any:
    """Return a profiler that adds up the times of each layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, time: float) -> None:
            milliseconds[name] = milliseconds.get(name, 0.0) + time

    return Profiler()


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array
