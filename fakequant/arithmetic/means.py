"""Means of magnitudes: what the scales of binary and ternary weights are made of."""

import torch
from torch import Tensor

from fakequant.arithmetic.ranges import Axis, kept_shape
from fakequant.arithmetic.reductions import reduced_axes


def mean_magnitude(x: Tensor, axis: Axis = None, where: Tensor | None = None) -> Tensor:
    """Return the mean of ``|x|`` without gradient, float32, shaped as ``kept_shape`` says.

    Args:
        x: data of any shape.
        axis: axis or axes that keep their own mean; None for one of the whole tensor.
        where: bool, shaped like x: the elements that count; None for all. The mean of none is 0.

    >>> mean_magnitude(torch.tensor([[1.0, -3.0], [0.0, 5.0]]), axis=0)
    tensor([[2.0000],
            [2.5000]])
    """
    magnitude = x.detach().to(torch.float32).abs()
    counted = torch.ones_like(magnitude) if where is None else where.to(torch.float32)
    reduced = reduced_axes(axis, x.ndim)
    if reduced:
        # By multiplication, not selection: NaN anywhere gives NaN.
        magnitude, counted = ((v.sum(reduced, keepdim=True)) for v in (magnitude * counted, counted))
    return (magnitude / counted.clamp(min=1.0)).reshape(kept_shape(x.shape, axis))
