"""Fake quantization to FP8 and FP4."""

from torch import Tensor

from fakequant import arithmetic
from fakequant.fake_quantize.ste import straight_through
from fakequant.onnx_ops import is_exporting, quantize_dequantize_float


def fake_quantize_float(x: Tensor, scale: Tensor, num_bits: tuple[int, int]) -> Tensor:
    """Return x rounded to a float format times scale, saturating, in x's shape and dtype.

    The gradient is the straight-through estimator up to the format's largest value times scale.

    Args:
        x: data of any shape and any float dtype; computed in float32.
        scale: float32, positive, broadcasts against x; gets no gradient.
        num_bits: the format, one of ``arithmetic.FLOAT_MAX``.

    >>> import torch
    >>> fake_quantize_float(torch.tensor([1.8]), torch.tensor(1.0), (4, 3)).tolist()
    [1.75]
    """
    if is_exporting():
        return quantize_dequantize_float(x, scale, num_bits)
    value = arithmetic.quantize_float(x, scale, num_bits).to(x.dtype)
    return straight_through(x, value, x.detach().abs() <= arithmetic.FLOAT_MAX[num_bits] * scale)
