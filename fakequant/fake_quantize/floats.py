"""Fake quantization to FP8 and FP4."""

from typing import Any

from torch import Tensor

from fakequant import arithmetic
from fakequant.descriptor_fields import FLOAT_FORMATS
from fakequant.fake_quantize.recompute import apply
from fakequant.fake_quantize.ste import ClippedStraightThrough
from fakequant.onnx_ops import is_exporting, quantize_dequantize_float

_ROUNDING = 2.0**-22
"""How far an amax may be beyond the largest value: its scale is rounded, and the quotient is rounded again."""


class _FakeQuantizeFloat(ClippedStraightThrough):
    """arithmetic's quantize_float, and its STE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, exponent: int, mantissa: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        edge = FLOAT_FORMATS[exponent, mantissa].max * (1 + _ROUNDING)
        ctx.edges = -edge, edge
        return arithmetic.quantize_float(x, scale, (exponent, mantissa)).to(x.dtype)


def fake_quantize_float(x: Tensor, scale: Tensor, num_bits: tuple[int, int]) -> Tensor:
    """Return x rounded to a float format times scale, saturating, in x's shape and dtype.

    The gradient is the straight-through estimator up to the format's largest value times scale.

    Args:
        x: data of any shape and any float dtype; computed in float32.
        scale: float32, positive, broadcasts against x; gets no gradient.
        num_bits: the format, one of ``descriptor_fields.FLOAT_FORMATS``.

    >>> import torch
    >>> fake_quantize_float(torch.tensor([1.8]), torch.tensor(1.0), (4, 3)).tolist()
    [1.75]
    """
    if is_exporting():
        return quantize_dequantize_float(x, scale, num_bits)
    return apply(_FakeQuantizeFloat, x, scale, *num_bits)
