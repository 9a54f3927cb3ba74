"""The formulas of quantization: pure functions of tensors. Only this package has them.

=========  =====================================================
integers   codes and values of integer grids
floats     the same of 8-bit floats
ranges     amax, its shape, and the scale that it gives
=========  =====================================================
"""

from fakequant.arithmetic.floats import FP8_E4M3_MAX, quantize_e4m3
from fakequant.arithmetic.integers import codes_in, dequantize, integer_bounds, quantize
from fakequant.arithmetic.ranges import (
    DEAD_AMAX,
    DEAD_SCALE,
    check_amax,
    kept_axes,
    kept_shape,
    reduce_amax,
    scale_from_amax,
)

__all__ = [
    "DEAD_AMAX",
    "DEAD_SCALE",
    "FP8_E4M3_MAX",
    "check_amax",
    "codes_in",
    "dequantize",
    "integer_bounds",
    "kept_axes",
    "kept_shape",
    "quantize",
    "quantize_e4m3",
    "reduce_amax",
    "scale_from_amax",
]
