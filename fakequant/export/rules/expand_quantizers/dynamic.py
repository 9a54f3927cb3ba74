"""Tensors whose range the graph computes, each call anew.

An affine uint8 grid is DynamicQuantizeLinear. On a symmetric one the tensor, or each vector along its last
axis ("tokens"), is divided by its scale before Q, which has no parameters of that shape::

    scale  = max |x| / highest code
    values = DQ(Q(x / scale, 1), 1) * scale

A dead range gets the scale that arithmetic.scale_from_amax gives it.
"""

import numpy as np
import onnx_ir as ir

from fakequant import arithmetic
from fakequant.descriptor_fields import TOKENS
from fakequant.export.rules.expand_quantizers.marker import Marker, Parameters
from fakequant.export.rules.expand_quantizers.types import integer_type

_FIRST_WITH_AXES_INPUT = 18
"""The opset from which ReduceMax takes its axes as an input."""


def quantize_dynamic(marker: Marker) -> ir.Value:
    """Return the values of a marker's data on a grid of the data's own range."""
    data = marker.floats()
    if marker.grid.affine:
        return marker.dequantize(*marker.quantize_dynamically(data))
    dtype, _ = integer_type(*marker.quantizer.bounds)
    zero_point = marker.constant("zero_point", np.zeros((), dtype.numpy()), dtype)
    parameters = Parameters(marker.constant("scale", np.float32(1)), zero_point, {})
    scale = _scale(marker, data, by_token=marker.grid.axis == TOKENS)
    codes = marker.quantize(marker.op("Div", [data, scale]), parameters)
    return marker.op("Mul", [marker.dequantize(codes, parameters), scale])


def _scale(marker: Marker, data: ir.Value, *, by_token: bool) -> ir.Value:
    """Return the scale: of the tensor, rank 0, or of each vector, with size 1 along the last axis."""
    shape = ir.Shape(()) if not by_token else None if data.shape is None else ir.Shape([*data.shape[:-1], 1])
    inputs: list[ir.Value | None] = [marker.op("Abs", [data])]
    attributes: dict[str, object] = {"keepdims": int(by_token)}
    if by_token and marker.opset >= _FIRST_WITH_AXES_INPUT:
        inputs.append(marker.constant("axes", np.array([-1], np.int64)))
    elif by_token:
        attributes["axes"] = [-1]
    amax = marker.op("ReduceMax", inputs, attributes)
    amax.shape = shape
    factor = marker.grid.scale_amax
    if factor is not None:
        amax = marker.op("Mul", [amax, marker.constant("scale_amax", np.float32(factor))])
    is_dead = marker.op("LessOrEqual", [amax, marker.constant("dead_amax", np.float32(arithmetic.DEAD_AMAX))])
    steps = marker.op("Div", [amax, marker.constant("maxbound", np.float32(marker.quantizer.maxbound))])
    dead_scale = marker.constant("dead_scale", np.float32(arithmetic.DEAD_SCALE))
    scale = marker.op("Where", [is_dead, dead_scale, steps])
    is_dead.type = ir.TensorType(ir.DataType.BOOL)
    for value in (amax, is_dead, steps, scale):
        value.shape = shape
    return scale
