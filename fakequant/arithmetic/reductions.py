"""What the elements that share a range have in common: their extremes, or all of them as a row."""

import math

import torch
from torch import Tensor

from fakequant.arithmetic.ranges import Axis, kept_axes, kept_shape


def reduced_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Return the axes that are not kept. Beware of (): to torch's reductions it means all of them.

    >>> reduced_axes(-1, 3), reduced_axes((0, 1), 2)
    ((0, 1), ())
    """
    keep = kept_axes(axis, ndim)
    return tuple(i for i in range(ndim) if i not in keep)


def memory_order(x: Tensor) -> list[int]:
    """Return the axes of x from the longest stride to the shortest.

    >>> memory_order(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    [0, 2, 3, 1]
    """
    return sorted(range(x.ndim), key=lambda d: x.stride()[d], reverse=True)


def flat_in_memory_order(x: Tensor) -> Tensor:
    """Return all values of x in one dimension, as a view whenever x is dense.

    ``x.flatten()`` copies a channels_last tensor, which costs more than reading it.
    """
    return x.permute(memory_order(x)).reshape(-1)


def as_rows(x: Tensor, axis: Axis = None) -> Tensor:
    """Return x as [rows, values], a row for each kept index, in the order of ``kept_shape``; values in any order.

    >>> as_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), axis=1)
    tensor([[1., 3.],
            [2., 4.]])
    """
    keep = kept_axes(axis, x.ndim)
    if not keep:
        return flat_in_memory_order(x).unsqueeze(0)
    x = x.movedim(keep, tuple(range(len(keep))))
    return x.reshape(math.prod(x.shape[: len(keep)]), math.prod(x.shape[len(keep) :]))


def extremes(x: Tensor, axis: Axis = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each kept index, shaped as ``kept_shape`` says.

    x must not be empty. NaN anywhere gives NaN. Where all axes are kept, both are x itself.

    >>> extremes(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), axis=0)
    (tensor([[-3.0000],
            [ 0.5000]]), tensor([[1.],
            [2.]]))
    """
    if not kept_axes(axis, x.ndim):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # The order of the memory is not theirs, and torch.onnx knows extremes of named axes only.
            every = tuple(range(x.ndim))
            return x.amin(every), x.amax(every)
        low, high = torch.aminmax(x if x.is_contiguous() else flat_in_memory_order(x))
        return low, high
    reduced = reduced_axes(axis, x.ndim)
    return (x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)) if reduced else (x, x)


def reduce_amax(x: Tensor, axis: Axis = None) -> Tensor:
    """Return the largest absolute value without gradient, shaped as ``kept_shape`` says.

    It has x's dtype, or float32 for integers, whose lowest value has no negative. NaN anywhere
    gives NaN; an empty tensor gives 0.

    >>> reduce_amax(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), axis=0)
    tensor([[3.],
            [2.]])
    """
    low, high = _ends(x, axis)
    return torch.maximum(low.neg(), high)


def reduce_range(x: Tensor, axis: Axis = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value without gradient, each at least widened to 0.

    Shapes, dtypes, NaN and empty tensors as in ``reduce_amax``.

    >>> reduce_range(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), axis=0)
    (tensor([[-3.],
            [ 0.]]), tensor([[1.],
            [2.]]))
    """
    low, high = _ends(x, axis)
    return low.clamp(max=0.0), high.clamp(min=0.0)


def _ends(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    x = x.detach() if x.is_floating_point() else x.to(torch.float32)
    if x.numel() == 0:
        nothing = x.new_zeros(kept_shape(x.shape, axis))
        return nothing, nothing
    return extremes(x, axis)
