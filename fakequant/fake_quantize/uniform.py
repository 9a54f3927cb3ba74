"""The differentiable quantize-dequantize operator, in eager mode, compiled, and under ONNX export.

The gradient is the straight-through estimator (Bengio, Leonard and Courville 2013,
arXiv:1308.3432) restricted to the grid: it passes unchanged where x rounds to a code
without being clamped, and is zero elsewhere, as in torch.fake_quantize_per_tensor_affine; only
exactly half a step below an even lowest code, which rounds up to it, torch still passes it.
"""

from typing import Any

import torch
from torch import Tensor

from fakequant import arithmetic
from fakequant.fake_quantize.recompute import apply
from fakequant.fake_quantize.ste import ClippedStraightThrough
from fakequant.onnx_ops import as_constant, is_exporting, quantize_dequantize, torchscript_quantize_dequantize


class _FakeQuantize(ClippedStraightThrough):
    """arithmetic's quantize and dequantize, and their STE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.edges = low - 0.5, high + 0.5
        return arithmetic.quantize(x, scale, low, high).mul_(scale).to(x.dtype)

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
    return apply(_FakeQuantize, x, scale, low, high)
