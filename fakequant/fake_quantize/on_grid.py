"""Fake quantization by a descriptor and a range: the one place that chooses the operator."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize.affine import fake_quantize_affine
from fakequant.fake_quantize.floats import fake_quantize_float
from fakequant.fake_quantize.learned import lsq, lsq_plus, pact
from fakequant.fake_quantize.uniform import fake_quantize


def fake_quantize_on(grid: QuantDescriptor, x: Tensor, amax: Tensor, amin: Tensor | None = None) -> Tensor:
    """Return x rounded to a grid, in x's shape and dtype, with STE gradient to x.

    Args:
        grid: of the uniform scheme, its range not learned.
        x: data of any shape and any float dtype.
        amax: float32; broadcasts against x, or has ``arithmetic.block_shape``.
        amin: the same for the lower end, for an affine grid.

    >>> import torch
    >>> fake_quantize_on(QuantDescriptor(4, block_size=2), torch.tensor([7.0, 0.6, 0.3, 0.1]), torch.tensor([7.0, 0.7]))
    tensor([7.0000, 1.0000, 0.3000, 0.1000])
    """
    data, scale, zero_point = arithmetic.in_blocks(grid, x, *arithmetic.grid_parameters(grid, amax, amin))
    return arithmetic.out_of_blocks(grid, _fake_quantize(grid, data, scale, zero_point), x.shape)


def fake_quantize_learned(
    grid: QuantDescriptor, x: Tensor, amax: Tensor, amin: Tensor | None = None, *, count: int
) -> Tensor:
    """Return x rounded to a grid whose range is learned: gradients to x, amax and amin; see ``learned``.

    Args:
        grid: with a method in ``learn_amax``.
        x: data of any shape and any float dtype.
        amax: float32; broadcasts against x.
        amin: the same for the lower end, for "lsq+".
        count: elements that share one step; see ``lsq``.
    """
    low, high = arithmetic.bounds_of(grid)
    if amin is not None:
        return lsq_plus(x, amin, amax, low, high, count)
    return pact(x, amax, low, high) if grid.learn_amax == "pact" else lsq(x, amax, low, high, count)


def _fake_quantize(grid: QuantDescriptor, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if isinstance(grid.num_bits, tuple):
        return fake_quantize_float(x, scale, grid.num_bits)
    low, high = arithmetic.bounds_of(grid)
    if zero_point is not None:
        return fake_quantize_affine(x, scale, zero_point, low, high)
    return fake_quantize(x, scale, low, high)
