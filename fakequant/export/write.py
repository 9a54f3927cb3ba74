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

    Raises:
        ExportError: the checker refuses the model; nothing is written.
    """
    held = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{path.name}.data" if held > _EXTERNAL_DATA_ABOVE else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        ir.save(model, temporary, external_data=data_name)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        if data_name is not None:
            (Path(folder) / data_name).replace(path.parent / data_name)
        temporary.replace(path)
    return size
