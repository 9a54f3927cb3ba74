"""Files of named tensors: safetensors, written whole or not at all, with what they hold in the header."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fakequant.errors import CheckpointError, InvalidTypeError


def check_path(path: object) -> None:
    """Check that a path is one.

    Raises:
        InvalidTypeError: neither a str nor an os.PathLike.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"path: expected a str or an os.PathLike, got {path!r}")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, first under a name that no other process has; an older one stays until the new one is whole.

    Args:
        path: of the file.
        tensors: on the CPU, contiguous, none a view of the memory of another.
        metadata: for the header.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=f".{Path(path).name}.") as folder:
            temporary = Path(folder) / "file"
            save_file(dict(tensors), temporary, dict(metadata))
            temporary.replace(path)
    except (OSError, KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: expected to write a file, got: {error}") from error


def read_tensors(
    path: str | os.PathLike[str], file_format: str, writer: str
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors and the header of a file; nothing of it is executed.

    Args:
        path: of the file.
        file_format: that its header has to name.
        writer: name of the function that writes such files.

    Raises:
        CheckpointError: no such file, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"expected a file of {writer}, got: {error}") from error
    if metadata.get("format") != file_format:
        raise CheckpointError(f"expected a file of {writer}, got the format {metadata.get('format')!r}")
    return tensors, metadata


def json_object(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return a JSON object of a header.

    Raises:
        CheckpointError: none of that name, or something else.
    """
    try:
        value = json.loads(metadata.get(name, ""))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{name}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: expected an object, got {type(value).__name__}")
    return value
