"""The differentiable quantize-dequantize operator, in eager mode, compiled, and under ONNX export.

The gradient is the straight-through estimator (Bengio, Leonard and Courville 2013,
arXiv:1308.3432) restricted to the grid: it passes unchanged where x rounds to a code
without being clamped, and is zero elsewhere, as in torch.fake_quantize_per_tensor_affine.
"""

from typing import Any

import torch
from torch import Tensor

from fakequant import arithmetic
from fakequant.onnx_ops import as_constant, is_exporting, quantize_dequantize, torchscript_quantize_dequantize


class _FakeQuantize(torch.autograd.Function):
    """arithmetic's quantize and dequantize, and their STE. Keeps x and scale for backward, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.edges = low - 0.5, high + 0.5
        return arithmetic.quantize(x, scale, low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
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

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, low: int, high: int) -> Any:
        return torchscript_quantize_dequantize(g, x, scale, low, high)


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return x rounded to the grid ``scale * {low..high}``, in x's shape and dtype, with STE gradient.

    Args:
        x: data of any shape and any float dtype; computed in float32.
        scale: float32, positive, broadcasts against x; gets no gradient.
        low: lowest code.
        high: highest code.

    >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
    >>> fake_quantize(x, torch.tensor(0.5), -8, 7).tolist()
    [0.5, 3.5]
    """
    if is_exporting():
        if not torch.jit.is_tracing():
            return quantize_dequantize(x, scale, low, high)
        traced: Tensor = _FakeQuantize.apply(x.to(torch.float32), as_constant(scale), low, high)  # type: ignore[no-untyped-call]
        return traced.to(x.dtype)
    result: Tensor = _FakeQuantize.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    return result
