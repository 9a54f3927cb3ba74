"""Blocks: consecutive elements along one axis that share a range, as in ONNX's blocked quantization (opset 21)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fakequant.errors import InvalidValueError


def as_blocks(x: Tensor, size: int, axis: int = -1) -> Tensor:
    """Return x [..., D, ...] as [..., ceil(D / size), size]: the block axis last, the last block filled with 0.

    Raises:
        InvalidValueError: x has no such axis.

    >>> import torch
    >>> as_blocks(torch.arange(1.0, 7.0).reshape(2, 3), 2)
    tensor([[[1., 2.],
             [3., 0.]],
    <BLANKLINE>
            [[4., 5.],
             [6., 0.]]])
    """
    x = x.movedim(_checked(axis, x.ndim), -1)
    missing = -x.shape[-1] % size
    x = F.pad(x, (0, missing)) if missing else x
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def from_blocks(blocks: Tensor, shape: Sequence[int], axis: int = -1) -> Tensor:
    """Undo ``as_blocks`` for a tensor of this shape.

    >>> import torch
    >>> from_blocks(as_blocks(torch.arange(6.0).reshape(3, 2), 2, axis=0), (3, 2), axis=0)
    tensor([[0., 1.],
            [2., 3.],
            [4., 5.]])
    """
    return blocks.flatten(-2)[..., : shape[axis]].movedim(-1, axis)


def block_shape(shape: Sequence[int], size: int, axis: int = -1) -> tuple[int, ...]:
    """Return the shape of the scales: that of the data, with the block axis divided by the size and rounded up.

    >>> block_shape((8, 70), 32), block_shape((64, 8), 32, axis=0)
    ((8, 3), (2, 8))
    """
    axis = _checked(axis, len(shape)) % len(shape)
    return tuple(-(-length // size) if i == axis else length for i, length in enumerate(shape))


def over_blocks(bound: Tensor, axis: int = -1) -> Tensor:
    """Return a tensor of ``block_shape``, such as amax, shaped to broadcast against ``as_blocks``.

    >>> import torch
    >>> over_blocks(torch.zeros(2, 8), axis=0).shape
    torch.Size([8, 2, 1])
    """
    return bound.movedim(axis, -1).unsqueeze(-1)


def per_block(bound: Tensor, axis: int = -1) -> Tensor:
    """Undo ``over_blocks``: return [..., blocks, 1], such as a reduction of ``as_blocks``, in ``block_shape``.

    >>> import torch
    >>> per_block(torch.zeros(8, 2, 1), axis=0).shape
    torch.Size([2, 8])
    """
    return bound.squeeze(-1).movedim(-1, axis)


def _checked(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise InvalidValueError(
            f"block_axis: expected -{ndim} to {ndim - 1} for a tensor of {ndim} dimensions, got {axis}"
        )
    return axis
