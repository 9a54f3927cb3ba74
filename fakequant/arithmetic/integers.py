"""Integer grids: codes and values.

ONNX QuantizeLinear and DequantizeLinear with zero point 0 (opset 10 to 25)::

    code    = clamp(round_half_even(x / scale), low, high)
    value   = code * scale

It divides by the scale instead of multiplying by its reciprocal: the reciprocal moves
elements by a step. Everything is computed in float32, as the runtimes do, whatever the
dtype of x.
"""

import torch
from torch import Tensor

from fakequant.errors import InvalidValueError


def integer_bounds(num_bits: int, unsigned: bool = False, narrow_range: bool = False) -> tuple[int, int]:
    """Return the lowest and highest code of a grid.

    >>> integer_bounds(8), integer_bounds(8, narrow_range=True), integer_bounds(8, unsigned=True)
    ((-128, 127), (-127, 127), (0, 255))
    """
    if unsigned:
        return 0, 2**num_bits - 1
    high = 2 ** (num_bits - 1) - 1
    return (-high if narrow_range else -high - 1), high


def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return the codes of x as float32 integers; scale broadcasts against x.

    Ties go to the even code; NaN stays NaN; Inf becomes the outermost code.

    >>> quantize(torch.tensor([0.5, 1.5, -999.0]), torch.tensor(1.0), -128, 127)
    tensor([   0.,    2., -128.])
    """
    return x.to(torch.float32).div(scale).round_().clamp_(low, high)


def codes_in(codes: Tensor, dtype: torch.dtype, high: int) -> Tensor:
    """Return codes up to high in a float dtype, or raise InvalidValueError if it cannot hold them all.

    >>> codes_in(torch.tensor([127.0]), torch.bfloat16, 127)
    tensor([127.], dtype=torch.bfloat16)
    """
    exact = int(2 / torch.finfo(dtype).eps)
    if high > exact:
        raise InvalidValueError(f"num_bits: expected codes up to {exact}, which {dtype} holds exactly, got {high}")
    return codes.to(dtype)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the values of codes in float32.

    >>> dequantize(torch.tensor([-128.0, 127.0]), torch.tensor(0.5))
    tensor([-64.0000,  63.5000])
    """
    return codes.to(torch.float32) * scale
