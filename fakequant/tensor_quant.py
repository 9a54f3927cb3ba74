"""The functions that users of NVIDIA's pytorch-quantization know, over descriptor, arithmetic and fake_quantize.

``amax`` is a tensor that broadcasts against the inputs. Every function computes in
float32 and returns the dtype of its input, with the straight-through gradient.
"""

import torch
from torch import Tensor

from fakequant import arithmetic
from fakequant.descriptor import (
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_PER_TENSOR,
    QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR,
    QuantDescriptor,
    ScaledQuantDescriptor,
)
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.fake_quantize import fake_quantize, fake_quantize_float, straight_through

__all__ = [
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "QuantDescriptor",
    "ScaledQuantDescriptor",
    "fake_affine_tensor_quant",
    "fake_tensor_quant",
    "scaled_e4m3",
    "tensor_quant",
]


def _check(inputs: Tensor, num_bits: int = 8) -> None:
    if not inputs.is_floating_point():
        raise InvalidTypeError(f"inputs: expected a floating point tensor, got {inputs.dtype}")
    if QuantDescriptor(num_bits).is_float:
        raise InvalidValueError("num_bits: expected an int here, got (4, 3); use scaled_e4m3")


def _grid(
    inputs: Tensor, amax: Tensor | float, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, int, int]:
    """Check the arguments and return scale, low and high."""
    _check(inputs, num_bits)
    checked = arithmetic.check_amax(amax).to(inputs.device)
    if unsigned and inputs.numel() and bool(inputs.detach().min() < 0):
        raise InvalidTypeError(
            f"Negative values encountered in unsigned quantization: minimum {float(inputs.detach().min())}"
        )
    low, high = arithmetic.integer_bounds(num_bits, unsigned, narrow_range)
    return arithmetic.scale_from_amax(checked, high), low, high


def tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the integer codes of inputs, and codes per unit (``bound / amax``, the ancestor's "scale").

    Args:
        inputs: floating point tensor of any shape.
        amax: largest absolute value on the grid; broadcasts against inputs.
        num_bits: 2 to 16.
        unsigned: codes 0 to ``2**num_bits - 1``.
        narrow_range: leave out the lowest code of a signed grid.

    Returns:
        Codes with inputs' shape and dtype, and the scale with amax's shape and inputs' dtype.

    Raises:
        InvalidTypeError: negative inputs on an unsigned grid; inputs not floating point.
        InvalidValueError: amax negative, NaN or Inf; num_bits out of range, or more than inputs' dtype holds.

    >>> codes, scale = tensor_quant(torch.tensor([0.5, -1.0]), torch.tensor(1.0))
    >>> codes.tolist(), scale.item()
    ([64.0, -127.0], 127.0)
    """
    scale, low, high = _grid(inputs, amax, num_bits, unsigned, narrow_range)
    codes = arithmetic.codes_in(arithmetic.quantize(inputs.detach(), scale, low, high), inputs.dtype, high)
    per_unit = scale.reciprocal()
    if inputs.dtype == torch.float16 and bool((per_unit > torch.finfo(torch.float16).max).any()):
        raise InvalidValueError(f"amax: expected at least {high / 65504:.3g} for float16 inputs, got {amax}")
    passes = inputs.detach().abs() <= torch.as_tensor(amax, device=inputs.device)
    return straight_through(inputs, codes, passes), per_unit.to(inputs.dtype)


def fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Return inputs rounded to the grid; arguments and errors as in ``tensor_quant``.

    >>> fake_tensor_quant(torch.tensor([0.5, -2.0]), torch.tensor(1.27)).tolist()
    [0.5, -1.2699999809265137]
    """
    return fake_quantize(inputs, *_grid(inputs, amax, num_bits, unsigned, narrow_range))


def fake_affine_tensor_quant(
    inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
) -> Tensor:
    """Return inputs rounded to the grid of ``2**num_bits`` levels between min_range and max_range (scalars).

    The gradient passes where ``min_range <= x <= max_range``.

    Raises:
        InvalidTypeError: inputs not floating point.
        InvalidValueError: the range is empty, not finite or not scalar; num_bits out of range.

    >>> fake_affine_tensor_quant(torch.tensor([0.0, 0.3, 9.0]), 0.0, 1.0, num_bits=2).tolist()
    [0.0, 0.3333333432674408, 1.0]
    """
    _check(inputs, num_bits)
    low, high = arithmetic.integer_bounds(num_bits)
    least, most = (torch.as_tensor(v, dtype=torch.float32, device=inputs.device) for v in (min_range, max_range))
    if least.numel() != 1 or most.numel() != 1:
        raise InvalidValueError(f"range: expected two scalars, got shapes {tuple(least.shape)} and {tuple(most.shape)}")
    step = (most - least) / (high - low)
    if not bool(torch.isfinite(step) & (step > 0)):
        raise InvalidValueError(f"range: expected finite min_range < max_range, got {min_range} and {max_range}")
    zero_point = low - torch.round(least / step)
    codes = inputs.detach().to(torch.float32).div(step).round_().add_(zero_point).clamp_(low, high)
    passes = (inputs.detach() >= least) & (inputs.detach() <= most)
    return straight_through(inputs, codes.sub_(zero_point).mul_(step).to(inputs.dtype), passes)


def scaled_e4m3(inputs: Tensor, amax: Tensor | float | None = None, E: int = 4, M: int = 3) -> Tensor:  # noqa: N803
    """Return inputs rounded to FP8 E4M3, scaled so that amax becomes 448; unscaled without amax.

    Raises:
        InvalidTypeError: inputs not floating point.
        InvalidValueError: (E, M) other than (4, 3); amax negative, NaN or Inf.

    >>> round(scaled_e4m3(torch.tensor(1.8), torch.tensor(2.0)).item(), 4)
    1.8571
    """
    _check(inputs)
    if (E, M) != (4, 3):
        raise InvalidValueError(f"E, M: expected (4, 3), got {(E, M)}")
    if amax is None:
        return fake_quantize_float(inputs, torch.ones((), device=inputs.device), (4, 3))
    checked = arithmetic.check_amax(amax).to(inputs.device)
    return fake_quantize_float(inputs, arithmetic.scale_from_amax(checked, arithmetic.FP8_E4M3_MAX), (4, 3))
