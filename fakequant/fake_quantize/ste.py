"""The straight-through estimator for any quantizer: a value forward, a masked gradient backward."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


class StraightThrough(Function):
    """Returns ``value``; the gradient goes to x wherever ``passes`` is true."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, passes: Tensor) -> Tensor:
        """Return value, shaped like x."""
        ctx.save_for_backward(passes)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Mask the gradient."""
        (passes,) = ctx.saved_tensors
        return grads[0] * passes, None, None


def straight_through(x: Tensor, value: Tensor, passes: Tensor) -> Tensor:
    """Return value in the forward pass and ``grad * passes`` to x in the backward pass; all shaped alike."""
    result: Tensor = StraightThrough.apply(x, value, passes)  # type: ignore[no-untyped-call]
    return result
