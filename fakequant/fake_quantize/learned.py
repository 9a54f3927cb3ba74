"""Fake quantization whose range is trained by gradient: LSQ, LSQ+ and PACT.

What is trained here is the range, amax (and amin), since that is what a quantizer keeps. LSQ
and LSQ+ train the step s (and the offset beta), of which the range is a linear map::

    amax = high * s + beta,    amin = low * s + beta,    beta = 0 on a symmetric grid

Plain SGD moves s by ``-rate * g_s`` and beta by ``-rate * g_beta``. It thereby moves amax by
``-rate * (high * g_s + g_beta)`` and amin by ``-rate * (low * g_s + g_beta)``. So these are the
gradients delivered for amax and amin: with them plain SGD on the range takes the papers' own steps.
(The chain rule would give g_s / high instead, a step of the paper's s smaller by high squared.)

An optimizer may step beyond zero. Every function therefore reads amax as ``|amax|`` and amin as
``-|amin|``, and turns the gradient around with them; a dead range (see ``arithmetic.DEAD_AMAX``)
has the positive scale of one, and goes on getting its gradient. The scale is always that of
``arithmetic``, thus the one that a file gets.

Range gradients are computed in float32 and summed to the shape of the range, whatever the dtype
of x; the gradient of x is of x's dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fakequant import arithmetic
from fakequant.fake_quantize.affine import fake_quantize_affine
from fakequant.fake_quantize.recompute import apply
from fakequant.fake_quantize.uniform import fake_quantize
from fakequant.onnx_ops import is_exporting

_CHUNK = 2**20  # elements at a time: temporaries stay in the cache (6.4e6, backward: 7 ms, unchunked 12 ms)

_hardtanh_backward = torch.ops.aten.hardtanh_backward


def lsq(x: Tensor, amax: Tensor, low: int, high: int, count: int) -> Tensor:
    """Return x rounded to the grid ``amax / high * {low..high}``, with the gradients of LSQ.

    Source: Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153), section 2:
    with ``v = x / s`` the step gets ``round(v) - v`` where ``low < v < high``, low or high
    elsewhere, all times ``1 / sqrt(count * high)``; x gets its gradient where ``low < v < high``.

    Args:
        x: data of any shape and float dtype; computed in float32.
        amax: float32, broadcasts against x.
        low: lowest code.
        high: highest code.
        count: elements that share one step: all weights of a tensor or channel; of activations the
            features of a layer, not counting the batch.

    >>> amax = torch.tensor(3.5, requires_grad=True)
    >>> lsq(torch.tensor([0.7, 9.0]), amax, -8, 7, count=2).tolist()
    [0.5, 3.5]
    """
    if is_exporting():
        return fake_quantize(x, _scale(amax, high), low, high)
    factor = arithmetic.lsq_gradient_scale(count, high)
    return apply(_LearnedStep, x, amax, None, low, high, factor)


def lsq_plus(x: Tensor, amin: Tensor, amax: Tensor, low: int, high: int, count: int) -> Tensor:
    """Return x rounded to an affine grid over [amin, amax], with the gradients of LSQ+.

    Source: Bhalgat et al. 2020, "LSQ+" (arXiv:2004.09576): with ``v = (x - beta) / s`` the step has
    the gradient of LSQ, and the offset beta gets 1 where not ``low < v < high``. The authors name no
    scale of these gradients; that of LSQ is applied to both.

    Their offset is any float. A file has an integer zero point, ``round(low - amin / s)``, so the
    offset in use is ``-zero_point * s``, at most half a step away. The formulas are taken at that
    offset, and its gradient goes to beta straight through the rounding. The range always holds 0.

    Args:
        x: data of any shape and float dtype; computed in float32.
        amin: float32, broadcasts against x.
        amax: float32, shaped like amin.
        low: lowest code.
        high: highest code.
        count: as for ``lsq``.

    >>> lsq_plus(torch.tensor([-0.3, 0.7, 9.0]), torch.tensor(-0.5), torch.tensor(7.0), 0, 15, count=3).tolist()
    [-0.5, 0.5, 7.0]
    """
    if is_exporting():
        return fake_quantize_affine(x, *_affine(amin, amax, low, high), low, high)
    factor = arithmetic.lsq_gradient_scale(count, high)
    return apply(_LearnedStep, x, amax, amin, low, high, factor)


def pact(x: Tensor, amax: Tensor, low: int, high: int) -> Tensor:
    """Return x rounded to the grid ``amax / high * {low..high}``, with the gradients of PACT.

    Source: Choi et al. 2018, "PACT" (arXiv:1805.06085), equations 1 to 3: amax gets the gradient of
    every ``x >= amax`` and nothing from inside; x gets its gradient inside, 0 < x < amax. On a signed
    grid, which the paper has not, inside begins at -amax, and amax gets minus the gradient of every
    ``x <= -amax``.

    Args:
        x: data of any shape and float dtype; computed in float32.
        amax: float32, broadcasts against x.
        low: lowest code.
        high: highest code.

    >>> amax = torch.tensor(3.5, requires_grad=True)
    >>> pact(torch.tensor([0.7, 9.0, -9.0]), amax, -7, 7).tolist()
    [0.5, 3.5, -3.5]
    """
    if is_exporting():
        return fake_quantize(x, _scale(amax, high), low, high)
    return apply(_LearnedClip, x, amax, low, high)


class _LearnedStep(torch.autograd.Function):
    """The forward pass of ``fake_quantize`` or ``fake_quantize_affine``; keeps x and the range for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, amin: Tensor | None, low: int, high: int, factor: float) -> Tensor:
        ctx.save_for_backward(x, amax, amin)
        ctx.constants = low, high, factor
        scale, *zero_point = _grid(amax, amin, low, high)
        if not zero_point:
            return arithmetic.quantize(x, scale, low, high).mul_(scale).to(x.dtype)
        codes = arithmetic.quantize_affine(x, scale, zero_point[0], low, high)
        return codes.sub_(zero_point[0]).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, amax, amin = ctx.saved_tensors
        low, high, factor = ctx.constants

        def rule(x: Tensor, grad: Tensor, to_x: Tensor, scale: Tensor, *zero_point: Tensor) -> _Sums:
            position = x.to(torch.float32).div(scale)
            if zero_point:
                position.add_(zero_point[0])
            _hardtanh_backward.grad_input(grad, position, low, high, grad_input=to_x)
            # round(v) - v inside, low or high outside; the difference before the sum, or its digits cancel.
            of_step = position.clamp(low, high).round_()
            _hardtanh_backward.grad_input(position, position, low, high, grad_input=position)
            to_step = _inner(of_step.sub_(position), grad, scale)
            return to_step, (grad - to_x).sum_to_size(scale.shape) if zero_point else to_step

        to_x, to_step, to_offset = _sums(rule, x, grads[0], *_grid(amax, amin, low, high))
        if amin is None:
            return to_x, to_step * _signed(factor * high, amax), None, None, None, None
        to_amax, to_amin = (bound * to_step + to_offset for bound in (high, low))
        return to_x, to_amax * _signed(factor, amax), to_amin * _signed(-factor, amin), None, None, None


class _LearnedClip(torch.autograd.Function):
    """The forward pass of ``fake_quantize``; keeps x and amax for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, amax)
        ctx.bounds = low, high
        scale = _scale(amax, high)
        return arithmetic.quantize(x, scale, low, high).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        low, high = ctx.bounds
        end = torch.where(amax.abs() <= arithmetic.DEAD_AMAX, high * arithmetic.DEAD_SCALE, amax.abs())
        lowest = -1 if low else 0

        def rule(x: Tensor, grad: Tensor, to_x: Tensor, end: Tensor) -> _Sums:
            position = x.to(torch.float32).div(end)
            _hardtanh_backward.grad_input(grad, position, lowest, 1, grad_input=to_x)
            to_end = _inner(position.clamp_(lowest, 1), grad - to_x, end)
            return to_end, to_end

        to_x, to_end, _ = _sums(rule, x, grads[0], end)
        return to_x, to_end * _signed(1.0, amax), None, None


def _scale(amax: Tensor, high: int) -> Tensor:
    return arithmetic.scale_from_amax(amax.abs(), high)


def _affine(amin: Tensor, amax: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return arithmetic.affine_parameters(-amin.abs(), amax.abs(), low, high)


def _grid(amax: Tensor, amin: Tensor | None, low: int, high: int) -> tuple[Tensor, ...]:
    """Return the scale, and for an affine grid the zero point."""
    return (_scale(amax, high),) if amin is None else _affine(amin, amax, low, high)


def _signed(factor: float, bound: Tensor) -> Tensor:
    """Return factor times the derivative of ``|bound|``, taken as 1 at 0, lest a range of 0 stays there."""
    return torch.where(bound < 0, -factor, factor)


_Sums: TypeAlias = tuple[Tensor, Tensor]

_Rule: TypeAlias = Callable[..., _Sums]
"""(x, its output's gradient, where to write x's gradient, *grid) -> two sums shaped like the grid's tensors."""


def _sums(rule: _Rule, x: Tensor, grad: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x's gradient in x's dtype, and the two sums of a rule."""
    grad, to_x = grad.to(torch.float32), torch.empty_like(x, dtype=torch.float32)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        first, second = rule(x, grad, to_x, *grid)
    elif grid[0].numel() > 1:
        first, second = _by_chunks(rule, (x, grad, to_x), grid, max(1, _CHUNK * len(x) // x.numel()))
    else:
        order = arithmetic.memory_order(to_x)  # a dense x is not copied
        flat = [v.permute(order).reshape(-1) for v in (x, grad, to_x)]
        first, second = _by_chunks(rule, flat, [v.reshape(()) for v in grid], _CHUNK)
    return to_x.to(x.dtype), first.reshape(grid[0].shape), second.reshape(grid[0].shape)


def _by_chunks(rule: _Rule, tensors: Sequence[Tensor], grid: Sequence[Tensor], rows: int) -> _Sums:
    """Apply a rule to so many rows at a time, each with the rows of the grid that belong to it."""
    if rows >= len(tensors[0]):
        return rule(*tensors, *grid)
    by_row = grid[0].ndim == tensors[0].ndim and len(grid[0]) > 1
    chunks = [slice(start, start + rows) for start in range(0, len(tensors[0]), rows)]
    sums = [rule(*(v[c] for v in tensors), *(v[c] if by_row else v for v in grid)) for c in chunks]
    first, second = (torch.cat(v) if by_row else torch.stack(v).sum(0) for v in zip(*sums, strict=True))
    return first, second


def _inner(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Return the sums of ``a * b`` over what shares a range, shaped like scale; overwrites a."""
    if a.ndim == 1 and scale.ndim == 0:
        return torch.dot(a, b)  # does not round the products
    return a.mul_(b).sum_to_size(scale.shape)
