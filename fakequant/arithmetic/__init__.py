"""The formulas of quantization: pure functions of tensors. Only this package has them.

==============  ================================================================
integers        codes and values of symmetric integer grids
affine          the same with a zero point
floats          8-bit and 4-bit floats
codes           a tensor as codes, scale and zero point
ranges          amax, its shape, and the scale that it gives
reductions      the extremes of what shares a range; as rows
power_of_two    scales that are powers of two
microscaling    scales of MX and NVFP4 blocks
blocks          consecutive elements that share a range
grid            from a descriptor and a range to scale and zero point
means           means of magnitudes
binary          two values: BNN, XNOR-Net
ternary         three values: TWN
dorefa          weights and gradients of DoReFa-Net
learned_ranges  where LSQ and LSQ+ start, and how far they step
==============  ================================================================
"""

from fakequant.arithmetic.affine import affine_parameters, dequantize_affine, quantize_affine
from fakequant.arithmetic.binary import binary_codes, scaled_binary_codes
from fakequant.arithmetic.blocks import as_blocks, block_shape, from_blocks, over_blocks, per_block
from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.dorefa import dorefa_codes, dorefa_squashed, quantize_gradient
from fakequant.arithmetic.floats import FP8_E4M3_MAX, quantize_float
from fakequant.arithmetic.grid import (
    GridParameters,
    bounds_of,
    codes_on,
    grid_parameters,
    grouped,
    in_blocks,
    is_range_shape,
    maxbound_of,
    out_of_blocks,
    range_of,
    range_shape,
    values_on,
)
from fakequant.arithmetic.integers import codes_in, dequantize, integer_bounds, quantize
from fakequant.arithmetic.learned_ranges import lsq_amax, lsq_gradient_scale, lsq_plus_weight_amax
from fakequant.arithmetic.means import mean_magnitude
from fakequant.arithmetic.microscaling import e8m0_scale, nvfp4_scales
from fakequant.arithmetic.power_of_two import power_of_two_scale
from fakequant.arithmetic.ranges import (
    DEAD_AMAX,
    DEAD_SCALE,
    Axis,
    check_amax,
    check_amin,
    kept_axes,
    kept_shape,
    scale_from_amax,
)
from fakequant.arithmetic.reductions import (
    as_rows,
    extremes,
    memory_order,
    reduce_amax,
    reduce_range,
)
from fakequant.arithmetic.ternary import ternary_codes

__all__ = [
    "DEAD_AMAX",
    "DEAD_SCALE",
    "FP8_E4M3_MAX",
    "Axis",
    "Codes",
    "GridParameters",
    "affine_parameters",
    "as_blocks",
    "as_rows",
    "binary_codes",
    "block_shape",
    "bounds_of",
    "check_amax",
    "check_amin",
    "codes_in",
    "codes_on",
    "dequantize",
    "dequantize_affine",
    "dorefa_codes",
    "dorefa_squashed",
    "e8m0_scale",
    "extremes",
    "from_blocks",
    "grid_parameters",
    "grouped",
    "in_blocks",
    "integer_bounds",
    "is_range_shape",
    "kept_axes",
    "kept_shape",
    "lsq_amax",
    "lsq_gradient_scale",
    "lsq_plus_weight_amax",
    "maxbound_of",
    "mean_magnitude",
    "memory_order",
    "nvfp4_scales",
    "out_of_blocks",
    "over_blocks",
    "per_block",
    "power_of_two_scale",
    "quantize",
    "quantize_affine",
    "quantize_float",
    "quantize_gradient",
    "range_of",
    "range_shape",
    "reduce_amax",
    "reduce_range",
    "scale_from_amax",
    "scaled_binary_codes",
    "ternary_codes",
    "values_on",
]
