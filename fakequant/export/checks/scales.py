"""Scales: their values, and how their shape fits the data."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.view import FLOATS, FOUR_BITS, Array, Quantizer, View

_WITH_BLOCKS = FOUR_BITS | {ir.DataType.FLOAT8E4M3FN}


@check("R4", Severity.ERROR, "Keep every scale above 0; a channel that is all zeros may have any scale, such as 1")
def bad_scale(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt, "Scale coefficients must all be positive"; a float16 scale may underflow to 0."""
    for quantizer in view.grids:
        scale = quantizer.scale
        if scale is None:
            continue
        if scale.size == 0:
            yield quantizer.node, "expected at least one scale, got none"
            continue
        values = scale.astype(np.float64)
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            yield (
                quantizer.node,
                f"expected finite scales above 0, got {wrong[0]:g} ({wrong.size} of {scale.size} are wrong)",
            )


@check("R4", Severity.ERROR, "Store scales as float32, float16 or bfloat16")
def scale_of_another_type(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt; E8M0 scales belong to its own ops."""
    for quantizer in view.grids:
        if quantizer.scale is not None and ir.DataType.from_numpy(quantizer.scale.dtype) not in FLOATS:
            yield quantizer.node, f"expected a float scale, got {quantizer.scale.dtype}"


@check("R5", Severity.ERROR, "Store the scale as an initializer")
def computed_scale(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt cannot verify such a scale, and refuses one of dynamic shape."""
    for quantizer in view.grids:
        scale = quantizer.node.inputs[1]
        if scale is not None and not view.is_constant(scale):
            yield quantizer.node, f"expected a constant scale, got {scale.name}, which depends on the input"


@check("R7", Severity.ERROR, "Give one scale for each channel of the axis, and write the axis out")
def scale_does_not_fit(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt; parsers up to 10.1 take 0 for a missing axis, later ones 1."""
    for quantizer in view.grids:
        if quantizer.is_blocked or quantizer.scale is None or quantizer.scale.size == 0:
            continue
        problem = _misfit(quantizer, quantizer.scale)
        if problem:
            yield quantizer.node, problem


def _misfit(quantizer: Quantizer, scale: Array) -> str:
    shape, axis = quantizer.data.shape, quantizer.axis
    if quantizer.is_per_tensor:
        is_scalar = shape is not None and shape.rank() == 0
        return "expected data of one dimension or more, got a scalar" if is_scalar else ""
    if axis is None:
        return f"expected an axis beside {scale.size} scales, got none"
    return misfit_along(axis, shape, scale)


def misfit_along(axis: int, shape: ir.Shape | None, scale: Array) -> str:
    """Return why scales, one a channel, do not fit along an axis; "" if they do or the file does not say."""
    if shape is None:
        return ""
    rank = shape.rank()
    if not -rank <= axis < rank:
        return f"expected an axis of data with {rank} dimensions, got {axis}"
    channels = shape[axis]
    if isinstance(channels, int) and channels != scale.size:
        return f"expected {channels} scales for axis {axis} of {list(shape)}, got {scale.size}"
    return ""


@check("R8", Severity.ERROR, "Use one scale for the whole activation")
def activation_per_channel(view: View) -> Iterator[Fault]:
    """Source: NvInfer.h: "activations cannot be quantized per-channel"."""
    for quantizer in view.grids:
        is_per_channel = not quantizer.is_per_tensor and not quantizer.is_blocked
        if is_per_channel and quantizer.scale is not None and not view.is_constant(quantizer.data):
            yield quantizer.node, f"expected one scale on an activation, got {quantizer.scale.size}"


@check("R9", Severity.ERROR, "Block int4 or FP4 weights along one of the last two dimensions; int8 has no blocks")
def bad_blocks(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt and NvInfer.h on blocked quantization."""
    for quantizer in view.grids:
        if quantizer.is_blocked and quantizer.scale is not None and (problem := _bad_block(quantizer, quantizer.scale)):
            yield quantizer.node, problem


def _bad_block(quantizer: Quantizer, scale: Array) -> str:
    if quantizer.codes is not None and quantizer.codes not in _WITH_BLOCKS:
        return f"expected one scale or one a channel for {quantizer.codes}, got blocks, {list(scale.shape)}"
    shape = quantizer.data.shape
    if shape is None or not shape.is_static():
        return ""
    sizes = shape.numpy()
    if len(sizes) != scale.ndim:
        return f"expected a scale with the {len(sizes)} dimensions of the data, got {list(scale.shape)}"
    blocked = [i for i, (size, parts) in enumerate(zip(sizes, scale.shape, strict=True)) if size != parts]
    fits = all(parts and size % parts == 0 for size, parts in zip(sizes, scale.shape, strict=True))
    if len(blocked) > 1 or not fits or any(i < scale.ndim - 2 for i in blocked):
        return f"expected equal blocks along one of the last two dimensions of {list(sizes)}, got {list(scale.shape)}"
    return ""
