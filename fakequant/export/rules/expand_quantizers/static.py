"""Tensors with a known range: Q and DQ, and a clamp in front where the grid is narrower than its ONNX type."""

import numpy as np
import onnx_ir as ir

from fakequant.export.rules.expand_quantizers.marker import Marker
from fakequant.export.rules.expand_quantizers.types import FLOAT_TYPES, integer_type


def quantize_static(marker: Marker) -> ir.Value:
    """Return what Q and DQ make of a marker's data."""
    scale, zero_point = marker.quantizer.scale, marker.quantizer.zero_point
    assert scale is not None
    if isinstance(marker.grid.num_bits, tuple):
        dtype, needs_clip = FLOAT_TYPES[marker.grid.num_bits], False
    else:
        dtype, needs_clip = integer_type(*marker.quantizer.bounds)
    parameters = marker.parameters(scale, zero_point, dtype)
    data = marker.floats()
    if needs_clip:
        zeros = np.float32(0) if zero_point is None else marker.broadcast(zero_point)
        for op_type, code in zip(("Max", "Min"), marker.quantizer.bounds, strict=True):
            bound = np.multiply(np.float32(code) - zeros, marker.broadcast(scale))
            data = marker.op(op_type, [data, marker.constant(op_type, bound)])
    return marker.dequantize(marker.quantize(data, parameters), parameters)
