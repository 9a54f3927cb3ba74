"""One call to run a file anywhere: ONNX Runtime on a CPU or GPU, or TensorRT."""

import importlib.util
import os

from fakequant.export.runtime import Session
from fakequant.export.tensorrt_engine import TensorrtEngine


def open_session(
    path: str | os.PathLike[str], *, provider: str = "cpu", optimized: bool = True
) -> Session | TensorrtEngine:
    """Load a file for a provider.

    ``"tensorrt"`` is the ``tensorrt`` package where it is installed, because it tells the precision and the
    time of each layer; otherwise it is ONNX Runtime's TensorRT provider. TensorRT always optimizes:
    ``optimized=False`` runs the file as written on the CPU, for what the engine is compared with.

    Args:
        path: of the file.
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``.
        optimized: with all optimizations, or with none.

    Raises:
        InvalidValueError: unknown provider.
        ValidationError: the provider is not installed (says what to install), or the file cannot be loaded.
    """
    if provider != "tensorrt":
        return Session(path, provider=provider, optimized=optimized)
    if not optimized:
        return Session(path, optimized=False)
    if importlib.util.find_spec("tensorrt") is not None:
        return TensorrtEngine(path)
    return Session(path, provider=provider)
