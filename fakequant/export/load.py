"""Reading an ONNX file from anywhere: whole, valid and self-contained, or refused with the reason.

Nothing in the file is executed. Tensors beside the file are read only from its own
folder: a location that leads out of it, by ``..``, an absolute path or a link, is refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from fakequant.errors import ValidationError

_NEWEST = {"": onnx.defs.onnx_opset_version(), "ai.onnx.ml": onnx.defs.onnx_ml_opset_version()}
"""{domain: the last opset that the installed onnx knows}."""


def load_model(path: str | os.PathLike[str]) -> ir.Model:
    """Read a file, with its functions inlined and its shapes inferred.

    Args:
        path: of the file. Ops of other domains than ONNX's are allowed.

    Raises:
        ValidationError: there is no such file; it is no ONNX, or cut off; its opset or an op is unknown; the
            onnx checker refuses it; its external data is missing, too short, or outside of the file's folder.
    """
    file = Path(path)
    if not file.is_file():
        got = "a folder" if file.is_dir() else "nothing there"
        raise ValidationError(f"{file}: expected an ONNX file, got {got}")
    model = _parsed(file)
    _check_opsets(model, file)
    _check_ops(model, file)
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, file)
    try:
        onnx.checker.check_model(file)
    except Exception as error:  # onnx raises its own types, unrelated to each other
        raise ValidationError(f"{file}: expected a valid ONNX model, got one that is not: {error}") from error
    for tensor in _tensors(model):
        _check_readable(tensor, file)
    return _flattened(model, file)


def _parsed(file: Path) -> ir.Model:
    if file.stat().st_size == 0:
        raise ValidationError(f"{file}: expected an ONNX file, got an empty one")
    try:
        model = ir.load(file, format="protobuf")
    except Exception as error:  # protobuf and onnx_ir raise their own types, unrelated to each other
        raise ValidationError(f"{file}: expected an ONNX file, got something else or a part of one: {error}") from error
    if not model.ir_version or not model.opset_imports:
        raise ValidationError(f"{file}: expected an ONNX file, got one without IR version or opset")
    return model


def _check_opsets(model: ir.Model, file: Path) -> None:
    for domain, version in model.opset_imports.items():
        newest = _NEWEST.get(_short(domain))
        if newest is not None and not 1 <= version <= newest:
            raise ValidationError(
                f"{file}: expected opset 1 to {newest} of domain {domain or 'ai.onnx'!r}, got {version} "
                f"(onnx {onnx.__version__} is installed)"
            )


def _check_ops(model: ir.Model, file: Path) -> None:
    versions = {_short(domain): version for domain, version in model.opset_imports.items()}
    # str: protobuf gives bytes for a name that is no UTF-8.
    names = {str(node.op_type) for node in _nodes(model) if node.domain == ""}
    names -= {name for domain, name, _ in model.functions if domain == ""}
    unknown = {name for name in names if not onnx.defs.has(name, versions.get("", _NEWEST[""]), "")}
    if unknown:
        raise ValidationError(
            f"{file}: expected ops of ONNX opset {versions.get('', 'none')}, got {', '.join(sorted(unknown))}. "
            "An op of one's own belongs in a domain of its own"
        )


def _check_external(tensor: ir.ExternalTensor, file: Path) -> None:
    where = f"{file}: external data of {tensor.name}"
    location, folder = str(tensor.location), file.absolute().parent
    data = folder / location
    if not _stays_in(folder, location):
        raise ValidationError(f"{where}: expected a file in the folder of the model, got {location!r}")
    if not data.is_file():
        raise ValidationError(f"{where}: expected the file {location}, got {'a folder' if data.is_dir() else 'none'}")
    offset, size = tensor.offset or 0, data.stat().st_size
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ValidationError(
            f"{where}: expected {tensor.nbytes} bytes for its shape and type, got a length of {tensor.length}"
        )
    if offset < 0 or offset + tensor.nbytes > size:
        raise ValidationError(
            f"{where}: expected {tensor.nbytes} bytes from {offset} on in {location}, got a file of {size}"
        )


def _stays_in(folder: Path, location: str) -> bool:
    """Whether a location leads to a file in a folder, links followed."""
    # Files from Windows may have backslashes; there is no good reason for one here.
    if not location or "\\" in location or PurePosixPath(location).is_absolute():
        return False
    try:
        data = (folder / location).resolve()
        data.is_file()  # fails on a name that is too long
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        return False
    return data.is_relative_to(folder.resolve())


def _check_readable(tensor: ir.TensorProtocol, file: Path) -> None:
    try:
        tensor.numpy()
    except Exception as error:  # NumPy and onnx_ir raise their own types, unrelated to each other
        raise ValidationError(
            f"{file}: expected {tensor.name} with {tensor.nbytes} bytes of data, got one that cannot be read: {error}"
        ) from error


def _flattened(model: ir.Model, file: Path) -> ir.Model:
    try:
        flat = InlinePass()(model).model
        untyped = [value for node in flat.graph.all_nodes() for value in node.outputs if value.type is None]
        untyped += [value for graph in flat.graph.subgraphs() for value in graph.inputs if value.type is None]
        inferred = ShapeInferencePass(strict_mode=False, check_type=False)(flat).model
    except Exception as error:  # onnx_ir raises its own types, unrelated to each other
        raise ValidationError(f"{file}: expected functions that can be inlined, got: {error}") from error
    for value in untyped:
        if value.shape is None:  # onnx_ir 1.1 takes a sequence of tensors for one tensor
            value.type = None
    return inferred


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every stored tensor: initializers, those of inner graphs too, and attributes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _short(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
