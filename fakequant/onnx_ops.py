"""What the fake-quantize operator becomes in an ONNX graph: QuantizeLinear and DequantizeLinear.

Both of torch's exporters get here by themselves when a model is exported: the
torch.export based one through torch.onnx.ops.symbolic, TorchScript through the
``symbolic`` of an autograd.Function. Scales and zero points become constants of the
file; zero points are always written, typed (TensorRT reads a missing one as int8, ONNX
as uint8).

Grids narrower than the container clip before Q. The one exception is [-127, 127] in
int8, where a Clip between a weight and its Q would cost TensorRT its fusion: there a
weight clipped by its calibration may become -128. fakequant.export_onnx has a way of its
own (export/trace.py), stores integer weights, and has no such case.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from fakequant.descriptor_fields import FLOAT_FORMATS
from fakequant.errors import ExportError

_CONTAINERS = (
    (torch.int8, -128, 127),
    (torch.uint8, 0, 255),
    (torch.int16, -(2**15), 2**15 - 1),
    (torch.uint16, 0, 2**16 - 1),
)


def is_exporting() -> bool:
    """Return torch.onnx.is_in_onnx_export(), which dynamo takes for False even while it captures for torch.onnx."""
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, less its import of torch._dynamo, which takes a second.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def container(low: int, high: int) -> tuple[torch.dtype, bool]:
    """Return the ONNX type that holds codes low..high, and whether its own clamp is not enough.

    >>> container(-127, 127), container(-8, 7), container(0, 255)
    ((torch.int8, False), (torch.int8, True), (torch.uint8, False))
    """
    for dtype, lowest, highest in _CONTAINERS:
        if lowest <= low and high <= highest and (lowest == 0) == (low == 0):
            return dtype, high != highest
    raise ExportError(f"codes: expected a range within 16 bits, got {low} to {high}")


def channel_axis(scale: Tensor) -> int | None:
    """Return the one axis along which scale varies; None per tensor; several axes are an error."""
    axes = [i for i, size in enumerate(scale.shape) if size != 1]
    if len(axes) > 1:
        raise ExportError(
            f"scale: expected one axis (ONNX has no multi-axis quantization), got shape {tuple(scale.shape)}"
        )
    return axes[0] if axes else None


def quantize_dequantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None = None) -> Tensor:
    """Return DequantizeLinear(QuantizeLinear(x)) as seen by the torch.export based exporter."""
    dtype, clip = container(low, high)
    values = x.to(torch.float32)
    if clip and zero_point is not None:
        values = values.clamp((low - zero_point) * scale, (high - zero_point) * scale)
    elif clip and scale.numel() == 1:
        # Not clamp: it becomes Max and Min, and onnxscript breaks the graph when it fuses two such pairs on one tensor.
        bounds = ((code * scale).reshape(()) for code in (low, high))
        values = torch.onnx.ops.symbolic("Clip", (values, *bounds), dtype=torch.float32, shape=values.shape)
    elif clip:
        values = values.clamp(low * scale, high * scale)
    return _emit(values, scale, dtype, zero_point).to(x.dtype)


def quantize_dequantize_float(x: Tensor, scale: Tensor, num_bits: tuple[int, int]) -> Tensor:
    """Return the FP8 pair (opset 19 and later) as seen by the torch.export based exporter."""
    dtype = FLOAT_FORMATS[num_bits].dtype
    if dtype is None:
        known = sorted(bits for bits, known in FLOAT_FORMATS.items() if known.dtype is not None)
        raise ExportError(f"num_bits: expected integers or one of {known}, got {num_bits}, which is simulated only")
    if torch.jit.is_tracing():
        raise ExportError(
            f"num_bits {num_bits}: FP8 needs torch.onnx.export(dynamo=True), got the TorchScript exporter"
        )
    return _emit(x.to(torch.float32), scale, dtype, None).to(x.dtype)


def _emit(values: Tensor, scale: Tensor, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    axis = channel_axis(scale)
    constant = scale.reshape(-1 if axis is not None else ())
    zero_point = (torch.zeros_like(constant) if given is None else given.reshape(constant.shape)).to(dtype)
    attributes: Any = {} if axis is None else {"axis": axis}
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (values, constant, zero_point),
        attributes,
        dtype=dtype,
        shape=values.shape,
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, constant, zero_point), attributes, dtype=torch.float32, shape=values.shape
    )


def torchscript_quantize_dequantize(g: Any, x: Any, scale: Any, low: int, high: int, zero_point: Any = None) -> Any:
    """Return the same nodes in a TorchScript graph ``g``; scale and zero point are constants there."""
    dtype, clip = container(low, high)
    values = scale.node().t("value")
    zeros = torch.zeros_like(values) if zero_point is None else zero_point.node().t("value")
    axis = channel_axis(values)
    if clip:
        lowest, highest = (g.op("Constant", value_t=values * (code - zeros)) for code in (low, high))
        x = g.op("Max", g.op("Min", x, highest), lowest)
    shape = (-1,) if axis is not None else ()
    scale = g.op("Constant", value_t=values.reshape(shape))
    zero_point = g.op("Constant", value_t=zeros.reshape(shape).to(dtype))
    attributes = {} if axis is None else {"axis_i": axis}
    codes = g.op("QuantizeLinear", x, scale, zero_point, **attributes)
    return g.op("DequantizeLinear", codes, scale, zero_point, **attributes).setType(x.type())


def as_constant(scale: Tensor) -> Tensor:
    """Return scale as a value that a TorchScript trace records as a constant instead of a computation."""
    with warnings.catch_warnings():
        # Freezing the scale is what is wanted here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.tensor(scale.tolist(), dtype=torch.float32)
