"""From a descriptor and a range to the parameters of the grid: its bounds, scale and zero point."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fakequant.arithmetic.affine import affine_parameters, dequantize_affine, quantize_affine
from fakequant.arithmetic.blocks import as_blocks, block_shape, from_blocks, over_blocks, per_block
from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.integers import dequantize, integer_bounds, quantize
from fakequant.arithmetic.microscaling import e8m0_scale, nvfp4_scales
from fakequant.arithmetic.power_of_two import power_of_two_scale
from fakequant.arithmetic.ranges import Axis, kept_shape, scale_from_amax
from fakequant.arithmetic.reductions import reduce_amax, reduce_range
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import FLOAT_FORMATS
from fakequant.errors import InvalidValueError


class GridParameters(NamedTuple):
    """What quantizes a tensor beside its bounds.

    Attributes:
        scale: float32, positive.
        zero_point: integers as float32, shaped like scale; None for zero.
    """

    scale: Tensor
    zero_point: Tensor | None


def bounds_of(grid: QuantDescriptor) -> tuple[int, int]:
    """Return the lowest and highest code.

    Raises:
        InvalidValueError: a float format, which has none.

    >>> bounds_of(QuantDescriptor(8, narrow_range=True))
    (-127, 127)
    """
    if isinstance(grid.num_bits, tuple):
        raise InvalidValueError(f"bounds: expected an integer grid, got num_bits {grid.num_bits}")
    return integer_bounds(grid.num_bits, grid.unsigned, grid.narrow_range)


def maxbound_of(grid: QuantDescriptor) -> float:
    """Return the largest value in units of the scale: 127 for int8, 448 for FP8 E4M3.

    >>> maxbound_of(QuantDescriptor(8)), maxbound_of(QuantDescriptor((2, 1)))
    (127, 6.0)
    """
    return FLOAT_FORMATS[grid.num_bits].max if isinstance(grid.num_bits, tuple) else bounds_of(grid)[1]


def grid_parameters(grid: QuantDescriptor, amax: Tensor, amin: Tensor | None = None) -> GridParameters:
    """Return scale and zero point of a grid for a range, shaped like the range.

    Args:
        grid: which formula: of its scale format, or for an affine one that of ``affine_parameters``.
        amax: the upper end, or the largest magnitude.
        amin: the lower end, at most 0; for an affine grid only.

    >>> import torch
    >>> grid_parameters(QuantDescriptor(8), torch.tensor(12.7))
    GridParameters(scale=tensor(0.1000), zero_point=None)
    """
    if grid.affine:
        assert amin is not None
        return GridParameters(*affine_parameters(amin, amax, *bounds_of(grid)))
    bits = grid.num_bits
    if grid.scale_format == "e4m3":
        return GridParameters(nvfp4_scales(amax, reduce_amax(amax)).scale, None)
    if grid.scale_format == "e8m0":
        of_integers = 1 if grid.unsigned else 2
        exponent = FLOAT_FORMATS[bits].largest_exponent if isinstance(bits, tuple) else bits - of_integers
        return GridParameters(e8m0_scale(amax, exponent), None)
    if grid.scale_format == "power_of_two" and isinstance(bits, int):
        return GridParameters(power_of_two_scale(amax, bits, grid.unsigned), None)
    return GridParameters(scale_from_amax(amax, maxbound_of(grid)), None)


def range_shape(grid: QuantDescriptor, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the range for data of a shape.

    >>> range_shape(QuantDescriptor(8, axis=0), (8, 70)), range_shape(QuantDescriptor(4, block_size=32), (8, 70))
    ((8, 1), (8, 3))
    """
    if grid.block_size is not None:
        return block_shape(shape, grid.block_size, grid.block_axis)
    return kept_shape(shape, grid.axis)


def is_range_shape(grid: QuantDescriptor, shape: Sequence[int]) -> bool:
    """Whether a shape is that of the range of some tensor, axes of size 1 aside; of blocks and tokens any may be.

    >>> is_range_shape(QuantDescriptor(8, axis=0), (8, 1)), is_range_shape(QuantDescriptor(8), (8, 1))
    (True, False)
    """
    if grid.block_size is not None or isinstance(grid.axis, str):
        return True
    num_kept = 0 if grid.axis is None else 1 if isinstance(grid.axis, int) else len(grid.axis)
    return sum(size > 1 for size in shape) <= num_kept


def range_of(grid: QuantDescriptor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (amax, amin) of the data itself, shaped as ``range_shape`` says; amin is None for a symmetric grid.

    >>> import torch
    >>> range_of(QuantDescriptor(8), torch.tensor([-3.0, 1.0]))
    (tensor(3.), None)
    """
    x, axis = grouped(grid, x)
    amin, amax = reduce_range(x, axis) if grid.affine else (None, reduce_amax(x, axis))
    if grid.block_size is None:
        return amax, amin
    return per_block(amax, grid.block_axis), None if amin is None else per_block(amin, grid.block_axis)


def grouped(grid: QuantDescriptor, x: Tensor) -> tuple[Tensor, Axis]:
    """Return x and the axes that keep their range; of blocks, x as blocks.

    >>> import torch
    >>> x, axis = grouped(QuantDescriptor(4, block_size=2), torch.zeros(3, 8))
    >>> x.shape, axis
    (torch.Size([3, 4, 2]), 'tokens')
    """
    if grid.block_size is None:
        return x, grid.axis
    return as_blocks(x, grid.block_size, grid.block_axis), "tokens"


def in_blocks(
    grid: QuantDescriptor, x: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return data, scale and zero point so that they broadcast: those of a grid with blocks as blocks."""
    if grid.block_size is None:
        return x, scale, zero_point
    axis = grid.block_axis
    zeros = None if zero_point is None else over_blocks(zero_point, axis)
    return as_blocks(x, grid.block_size, axis), over_blocks(scale, axis), zeros


def out_of_blocks(grid: QuantDescriptor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return data of a shape that was taken ``in_blocks`` as it was."""
    return x if grid.block_size is None else from_blocks(x, shape, grid.block_axis)


def codes_on(grid: QuantDescriptor, x: Tensor, amax: Tensor, amin: Tensor | None = None) -> Codes:
    """Return x as codes on an integer grid; scale and zero point have the shape of the range.

    Raises:
        InvalidValueError: a float format, which has no codes.

    >>> import torch
    >>> codes_on(QuantDescriptor(8), torch.tensor([-3.0, 1.0]), torch.tensor(12.7)).codes
    tensor([-30.,  10.])
    """
    low, high = bounds_of(grid)
    parameters = grid_parameters(grid, amax, amin)
    data, scale, zeros = in_blocks(grid, x, *parameters)
    codes = quantize(data, scale, low, high) if zeros is None else quantize_affine(data, scale, zeros, low, high)
    return Codes(out_of_blocks(grid, codes, x.shape), *parameters)


def values_on(grid: QuantDescriptor, held: Codes) -> Tensor:
    """Return what codes stand for, float32; the inverse of ``codes_on``.

    >>> import torch
    >>> held = Codes(torch.tensor([7.0, 1.0, 3.0]), torch.tensor([1.0, 0.5]), None)
    >>> values_on(QuantDescriptor(4, block_size=2), held)
    tensor([7.0000, 1.0000, 1.5000])
    """
    codes, scale, zeros = in_blocks(grid, *held)
    values = dequantize(codes, scale) if zeros is None else dequantize_affine(codes, scale, zeros)
    return out_of_blocks(grid, values, held.codes.shape)
