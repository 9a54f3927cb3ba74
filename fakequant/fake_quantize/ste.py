"""The straight-through estimator for any quantizer: a value forward, a masked gradient backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class ClippedStraightThrough(Function):
    """The backward pass of a function of x, scale and two more: the gradient goes to x where x / scale is inside.

    Its forward pass saves x and scale, and sets ``ctx.edges``, which themselves are outside.
    """

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Mask the gradient, without one for the scale."""
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high = ctx.edges
        hardtanh_backward = torch.ops.aten.hardtanh_backward
        compiling, on_cpu = torch.compiler.is_compiling(), x.device.type == "cpu"
        if on_cpu and not compiling and type(scale) is Tensor and scale.numel() == 1:
            # Edges as numbers spare a pass over memory. Not on an accelerator: float() would wait for it.
            step = float(scale)
            return hardtanh_backward(grad, x, low * step, high * step), None, None, None
        position = x.to(torch.float32) / scale
        if on_cpu and compiling:
            # Adds an empty sum, 0, so that the mask depends on grad and is computed here, from x. Else the
            # compiler stores a bool mask in forward, and its CPU code for that takes ten times as long.
            position = position + grad.reshape(-1)[:0].sum()
        elif grad.dtype == torch.float32 and not torch.is_grad_enabled():
            # In place: fresh memory costs more than the arithmetic.
            hardtanh_backward.grad_input(grad, position, low, high, grad_input=position)
            return position.to(x.dtype), None, None, None
        return hardtanh_backward(grad, position, low, high).to(x.dtype), None, None, None


class StraightThrough(Function):
    """Returns ``value``; the gradient goes to x, times ``passes`` where given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        """Return value, shaped like x."""
        ctx.save_for_backward(passes)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Mask the gradient."""
        (passes,) = ctx.saved_tensors
        return grads[0] if passes is None else grads[0] * passes, None, None


def straight_through(x: Tensor, value: Tensor, passes: Tensor | None = None) -> Tensor:
    """Return value in the forward pass and ``grad * passes`` to x, or grad, in the backward pass; all shaped alike."""
    result: Tensor = StraightThrough.apply(x, value, passes)  # type: ignore[no-untyped-call]
    return result
