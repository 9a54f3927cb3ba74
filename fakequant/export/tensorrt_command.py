"""tensorrt_command: the trtexec line that builds an engine from a file and shows the precision of its layers."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from fakequant.errors import InvalidValueError
from fakequant.export.graph import weight_dequantizers
from fakequant.export.load import load_model

_NEWEST_OPSET = {8: 19, 9: 19, 10: 24, 11: 25}
"""{TensorRT: the newest opset it reads}, of its last release (onnx-tensorrt's operators.md, rule R13).

8 lists 17 but does not check; 18 and 19 changed few of the ops that networks have.
"""

_STRONG_TYPES = frozenset(
    {
        *(ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT4, ir.DataType.FLOAT4E2M1),
        *(ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2),
    }
)
"""Types that say which precision to run in; a file with one of them wants a strongly typed network."""

ShapeRange = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, usual and largest shape of an input."""


def tensorrt_command(
    path: str | os.PathLike[str],
    *,
    version: int = 10,
    engine: str | os.PathLike[str] | None = None,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> str:
    """Return the trtexec line for a Q/DQ file, quoted for a shell.

    ========  =====================================================================================
    TensorRT  precision flags
    ========  =====================================================================================
    8, 9      ``--int8 --fp16``: without the first Q/DQ is an error. Weights need Q and DQ (rule R16)
    10        ``--int8 --fp16`` for a float32 file: TensorRT may run its float layers in half
              precision, which is what makes it fast; ``--stronglyTyped`` for a file with float16,
              bfloat16, FP8 or 4-bit parts, which runs exactly in the types of the file
    11        none: every network is strongly typed, and the flags are gone (rule R20). The float
              parts of a float32 file run in float32; export float16 for speed
    ========  =====================================================================================

    ``check_onnx`` says whether TensorRT takes the file. The line also prints each layer with its
    precision. Sources: NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x", TensorRT#4021.

    Args:
        path: of the file, as trtexec will find it.
        version: 8, 9, 10 or 11, the first part of TensorRT's version.
        engine: where the engine is saved; None to build it only.
        shapes: {input: (smallest, usual, largest shape)} of each input with an open dimension, such as
            ``{"x": ((1, 3, 224, 224), (8, 3, 224, 224), (32, 3, 224, 224))}``.

    Raises:
        InvalidValueError: another version; a file that it cannot read; shapes that are missing or do not fit.
        ValidationError: the file cannot be read.
    """
    if version not in _NEWEST_OPSET:
        raise InvalidValueError(f"version: expected one of {sorted(_NEWEST_OPSET)}, got {version!r}")
    model = load_model(path)
    words = [
        f"--onnx={Path(path)}",
        *_precision(model, version, path),
        *_shape_flags(model.graph, shapes or {}),
        *([] if engine is None else [f"--saveEngine={Path(engine)}"]),
        "--profilingVerbosity=detailed",
        "--dumpLayerInfo",
    ]
    return shlex.join(["trtexec", *words])


def _precision(model: ir.Model, version: int, path: str | os.PathLike[str]) -> list[str]:
    opset = model.opset_imports.get("", 0)
    if opset > _NEWEST_OPSET[version]:
        raise InvalidValueError(
            f"{path}: expected opset up to {_NEWEST_OPSET[version]} for TensorRT {version}, got {opset}"
        )
    strong = sorted({dtype.name for dtype in _dtypes(model.graph) if dtype in _STRONG_TYPES})
    if version < 10:
        _check_old(model.graph, version, path, strong)
    if version > 10:
        return []
    return ["--stronglyTyped"] if strong else ["--int8", "--fp16"]


def _check_old(graph: ir.Graph, version: int, path: str | os.PathLike[str], strong: Sequence[str]) -> None:
    if strong:
        raise InvalidValueError(
            f"{path}: expected float32 and int8 for TensorRT {version}, got {', '.join(strong)}. Export the float32 "
            "model; TensorRT chooses half precision by itself"
        )
    stored = [weight.name or "" for _, weight in weight_dequantizers(graph)]
    if stored:
        raise InvalidValueError(
            f"{path}: expected float weights behind Q and DQ for TensorRT {version} (R16), got {len(stored)} stored as "
            f'integers, such as {stored[0]}. Export with weights="float"'
        )


def _dtypes(graph: ir.Graph) -> Iterator[ir.DataType]:
    """Yield the types of all values, those of inner graphs too."""
    values = [*graph.inputs, *(value for inner in (graph, *graph.subgraphs()) for value in inner.initializers.values())]
    values += [output for node in graph.all_nodes() for output in node.outputs]
    yield from (value.dtype for value in values if value.dtype is not None)


def _shape_flags(graph: ir.Graph, shapes: Mapping[str, ShapeRange]) -> list[str]:
    inputs = {str(value.name): value for value in graph.inputs}
    dynamic = [name for name, value in inputs.items() if value.shape is None or not value.shape.is_static()]
    for name in shapes:
        if name not in dynamic:
            got = f"a static one, {_written(inputs[name])}" if name in inputs else "no such input"
            raise InvalidValueError(f"shapes: {name}: expected one of the dynamic inputs {dynamic}, got {got}")
    for name in dynamic:
        if name not in shapes:
            raise InvalidValueError(
                f"shapes: {name}: expected (smallest, usual, largest) for {_written(inputs[name])}, got none"
            )
        _check_shapes(name, inputs[name], shapes[name])
    return [
        f"--{word}Shapes={','.join(f'{_quoted(name)}:{_sized(shapes[name][index])}' for name in dynamic)}"
        for index, word in enumerate(("min", "opt", "max") if dynamic else ())
    ]


def _check_shapes(name: str, value: ir.Value, given: ShapeRange) -> None:
    expected = value.shape
    fits = _is_ordered(given) and (
        expected is None
        or all(
            len(shape) == expected.rank()
            and all(not isinstance(size, int) or size == got for size, got in zip(expected, shape, strict=True))
            for shape in given
        )
    )
    if not fits:
        raise InvalidValueError(
            f"shapes: {name}: expected three shapes, smallest to largest, that fit {_written(value)}, got {given}"
        )


def _is_ordered(given: object) -> bool:
    """Whether this is three shapes of one rank, none of which has a size that is smaller than in the one before."""
    if not isinstance(given, Sequence) or len(given) != 3 or not all(isinstance(shape, Sequence) for shape in given):
        return False
    if len({len(shape) for shape in given}) != 1 or not all(isinstance(size, int) for shape in given for size in shape):
        return False
    return all(1 <= low <= usual <= high for low, usual, high in zip(*given, strict=True))


def _written(value: ir.Value) -> str:
    return "a shape that the file does not say" if value.shape is None else str(value.shape)


def _quoted(name: str) -> str:
    """Return a name as trtexec reads it: a colon ends it unless it is quoted."""
    return f"'{name}'" if ":" in name else name


def _sized(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
