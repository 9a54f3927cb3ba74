"""From a descriptor and a range to the parameters of the grid: its bounds, scale and zero point."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fakequant.arithmetic.affine import affine_parameters, dequantize_affine, quantize_affine
from fakequant.arithmetic.blocks import as_blocks, block_shape, from_blocks, over_blocks
from fakequant.arithmetic.codes import Codes
from fakequant.arithmetic.floats import FLOAT_MAX
from fakequant.arithmetic.integers import dequantize, integer_bounds, quantize
from fakequant.arithmetic.microscaling import e8m0_scale, nvfp4_scales
from fakequant.arithmetic.power_of_two import power_of_two_scale
from fakequant.arithmetic.ranges import Axis, kept_shape, reduce_amax, reduce_range, scale_from_amax
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError

_LARGEST_EXPONENT = {(4, 3): 8, (5, 2): 15, (2, 1): 2}


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
    return FLOAT_MAX[grid.num_bits] if isinstance(grid.num_bits, tuple) else bounds_of(grid)[1]


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
        return GridParameters(nvfp4_scales(amax, amax.max()).scale, None)
    if grid.scale_format == "e8m0":
        exponent = _LARGEST_EXPONENT[bits] if isinstance(bits, tuple) else bits - (1 if grid.unsigned else 2)
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


def range_of(grid: QuantDescriptor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (amax, amin) of the data itself, shaped as ``range_shape`` says; amin is None for a symmetric grid.

    >>> import torch
    >>> range_of(QuantDescriptor(8), torch.tensor([-3.0, 1.0]))
    (tensor(3.), None)
    """
    axis: Axis = grid.axis
    if grid.block_size is not None:
        x, axis = as_blocks(x, grid.block_size, grid.block_axis), "tokens"
    if not grid.affine:
        amax, amin = reduce_amax(x, axis), None
    else:
        amin, amax = reduce_range(x, axis)
    if grid.block_size is None:
        return amax, amin
    back = (bound if bound is None else bound.squeeze(-1).movedim(-1, grid.block_axis) for bound in (amax, amin))
    return next(back), next(back)  # type: ignore[return-value]


def codes_on(grid: QuantDescriptor, x: Tensor, amax: Tensor, amin: Tensor | None = None) -> Codes:
    """Return x as codes on an integer grid; scale and zero point have the shape of the range.

    Raises:
        InvalidValueError: a float format, which has no codes.

    >>> import torch
    >>> codes_on(QuantDescriptor(8), torch.tensor([-3.0, 1.0]), torch.tensor(12.7)).codes
    tensor([-30.,  10.])
    """
    low, high = bounds_of(grid)
    scale, zero_point = grid_parameters(grid, amax, amin)
    steps, zeros = scale, zero_point
    if grid.block_size is not None:
        shape, x = x.shape, as_blocks(x, grid.block_size, grid.block_axis)
        steps = over_blocks(scale, grid.block_axis)
        zeros = None if zero_point is None else over_blocks(zero_point, grid.block_axis)
    codes = quantize(x, steps, low, high) if zeros is None else quantize_affine(x, steps, zeros, low, high)
    if grid.block_size is not None:
        codes = from_blocks(codes, shape, grid.block_axis)
    return Codes(codes, scale, zero_point)


def values_on(grid: QuantDescriptor, held: Codes) -> Tensor:
    """Return what codes stand for, float32; the inverse of ``codes_on``.

    >>> import torch
    >>> held = Codes(torch.tensor([7.0, 1.0, 3.0]), torch.tensor([1.0, 0.5]), None)
    >>> values_on(QuantDescriptor(4, block_size=2), held)
    tensor([7.0000, 1.0000, 1.5000])
    """
    codes, scale, zero_point = held
    if grid.block_size is not None:
        codes = as_blocks(codes, grid.block_size, grid.block_axis)
        scale = over_blocks(scale, grid.block_axis)
        zero_point = None if zero_point is None else over_blocks(zero_point, grid.block_axis)
    values = dequantize(codes, scale) if zero_point is None else dequantize_affine(codes, scale, zero_point)
    return values if grid.block_size is None else from_blocks(values, held.codes.shape, grid.block_axis)
