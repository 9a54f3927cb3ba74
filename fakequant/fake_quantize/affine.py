"""Fake quantization on an affine grid, with the straight-through gradient of ``uniform``."""

from typing import Any

import torch
from torch import Tensor

from fakequant import arithmetic
from fakequant.fake_quantize.recompute import apply
from fakequant.onnx_ops import as_constant, is_exporting, quantize_dequantize, torchscript_quantize_dequantize


class _FakeQuantizeAffine(torch.autograd.Function):
    """Keeps x, scale and zero point for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds = low, high
        codes = arithmetic.quantize_affine(x, scale, zero_point, low, high)
        return codes.sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, zero_point = ctx.saved_tensors
        low, high = ctx.bounds
        code = x.to(torch.float32).div(scale).add_(zero_point)
        masked = torch.ops.aten.hardtanh_backward(grad.to(torch.float32), code, low - 0.5, high + 0.5)
        return masked.to(x.dtype), None, None, None, None

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, low: int, high: int) -> Any:
        return torchscript_quantize_dequantize(g, x, scale, low, high, zero_point)


def fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Return x rounded to the grid ``scale * ({low..high} - zero_point)``, in x's shape and dtype, with STE gradient.

    Args:
        x: data of any shape and any float dtype; computed in float32.
        scale: float32, positive, broadcasts against x; gets no gradient.
        zero_point: integers as float32, shaped like scale.
        low: lowest code.
        high: highest code.

    >>> x = torch.tensor([-0.3, 0.26, 9.0], requires_grad=True)
    >>> fake_quantize_affine(x, torch.tensor(0.5), torch.tensor(1.0), 0, 15).tolist()
    [-0.5, 0.5, 7.0]
    """
    if is_exporting():
        if not torch.jit.is_tracing():
            return quantize_dequantize(x, scale, low, high, zero_point)
        constants = as_constant(scale), as_constant(zero_point)
        traced: Tensor = _FakeQuantizeAffine.apply(x.to(torch.float32), *constants, low, high)  # type: ignore[no-untyped-call]
        return traced.to(x.dtype)
    return apply(_FakeQuantizeAffine, x, scale, zero_point, low, high)
