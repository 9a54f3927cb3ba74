"""Writing a file: whole and valid, or not at all.

It is written under a temporary name in the same folder, checked there, and renamed.
"""

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from fakequant.errors import ExportError

_EXTERNAL_DATA_ABOVE = 2**31 - 2**27
"""Bytes of tensors from which on they go to a second file: a protobuf ends at 2 GiB."""


def write(model: ir.Model, path: Path) -> int:
    """Write the file, or the file and its data, and return their size in bytes.

    Data that an earlier file of this name had is removed.

    Raises:
        ExportError: the checker refuses the model, or the system the file; what was there before stays.
    """
    held = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = path.with_name(f"{path.name}.data")
    has_data = held > _EXTERNAL_DATA_ABOVE
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            ir.save(model, temporary, external_data=data.name if has_data else None)
            onnx.checker.check_model(temporary, full_check=True)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            _replace(path, data, Path(folder), has_data)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    except OSError as error:
        raise ExportError(f"{path}: expected to write a file, got: {error}") from error
    return size


def _replace(path: Path, data: Path, folder: Path, has_data: bool) -> None:
    """Put new files where old ones may be. At no time is there a graph with the data of another."""
    old = folder / "replaced"
    if has_data:
        if path.exists():
            path.replace(old)
        try:
            (folder / data.name).replace(data)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
    (folder / path.name).replace(path)
    if not has_data:
        data.unlink(missing_ok=True)
