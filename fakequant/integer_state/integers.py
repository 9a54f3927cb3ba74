"""From the quantized weights and biases of a model to their integers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fakequant.arithmetic import Codes, values_on
from fakequant.descriptor_fields import FLOAT_FORMATS
from fakequant.errors import InvalidValueError, ValidationError
from fakequant.integer_state.products import Product, products_of_calls, products_of_modules, weights_of_calls
from fakequant.integer_state.state import IntegerState, IntegerTensor
from fakequant.nn import TensorQuantizer
from fakequant.onnx_ops import container

_LARGEST_INT32 = 2**31 - 1


def integer_state(model: nn.Module, example_inputs: Any = None) -> IntegerState:
    """Return the integers that every quantized layer stands for.

    A weight has its own name (``layer1.0.conv1.weight``); each gate of an LSTM or GRU one of its own
    (``lstm.weight_ih_l0.i``; LSTM: i f g o, GRU: r z n); the weight of a functional call that of the call
    (``attention.linear_0.weight``). A bias is int32 with the scale of the input times that of the weight,
    where both are known; otherwise it stays float and is named in ``left_out``. These are the layer's own
    parameters: ``export_onnx`` folds a BatchNorm behind it into scales and bias, and its sign into codes. With one
    that ``qat.fold_batchnorm`` folded they are those of eval mode, as in the file.

    Args:
        model: quantized and calibrated.
        example_inputs: one batch, as for ``quantize``: what functional calls read is seen when they are made.
            Without it, their weights are named in ``left_out``.

    Raises:
        InvalidValueError: no quantized weight, or one whose range is unknown.
        ValidationError: codes that do not give the fake-quantized weight back, bit for bit.

    >>> from fakequant import calibrate, quantize
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = quantize(model)
    >>> _ = calibrate(model, [torch.ones(1, 2)], progress=False)
    >>> print(integer_state(model))
    weight  int8 (1, 2), 1 scale
    """
    calls = {} if example_inputs is None else products_of_calls(model, example_inputs)
    unseen = "read by a functional call: pass example_inputs that make it"
    left_out = {name: unseen for name in weights_of_calls(model) if name not in calls}
    tensors: dict[str, IntegerTensor] = {}
    for product in (*products_of_modules(model), *calls.values()):
        name, quantizer = product.name, product.quantizer
        if quantizer.needs_range and not quantizer.is_calibrated:
            raise InvalidValueError(f"{name}: expected a calibrated quantizer, got one whose range is unknown")
        if quantizer.descriptor.num_bits == (2, 1):
            left_out[name] = "FP4 has no dtype in safetensors"
            continue
        held = _integers(quantizer, product.weight)
        _check(name, held, quantizer, product.weight)
        tensors.update(_by_gate(name, held, product.gates))
        if product.bias is not None:
            bias = _bias(product, product.bias, held)
            if isinstance(bias, str):
                left_out[product.bias_name] = bias
            else:
                tensors.update(_by_gate(product.bias_name, bias, product.gates))
    if not tensors and not left_out:
        raise InvalidValueError("model: expected at least one layer with a quantized weight, got none")
    return IntegerState(tensors, left_out)


def _integers(quantizer: TensorQuantizer, weight: Tensor) -> IntegerTensor:
    if quantizer.descriptor.is_float:
        scale = quantizer.scale
        assert scale is not None
        dtype = FLOAT_FORMATS[quantizer.descriptor.num_bits].dtype  # type: ignore[index]
        assert dtype is not None  # FP4 is left out
        return IntegerTensor((quantizer(weight).to(torch.float32) / scale).to(dtype), scale, None)
    codes, scale, zero_point = quantizer.codes_of(weight)
    dtype, _ = container(*quantizer.bounds)
    return IntegerTensor(codes.to(dtype), scale, None if zero_point is None else zero_point.to(dtype))


def _check(name: str, held: IntegerTensor, quantizer: TensorQuantizer, weight: Tensor) -> None:
    """Compare what the codes stand for with what the quantizer gives."""
    with torch.no_grad():
        expected = quantizer(weight).to(torch.float32)
    zero_point = None if held.zero_point is None else held.zero_point.to(torch.float32)
    found = values_on(quantizer.descriptor, Codes(held.codes.to(torch.float32), held.scale, zero_point))
    if not torch.equal(found.to(weight.dtype).to(torch.float32), expected):
        worst = float((found - expected).abs().max())
        raise ValidationError(f"{name}: expected codes that give the fake-quantized values, got values {worst} apart")


def _by_gate(name: str, held: IntegerTensor, gates: str) -> dict[str, IntegerTensor]:
    rows = 1 if held.scale.ndim == 0 else len(held.scale)
    if not gates or rows not in (1, len(held.codes)):  # a block may be of two gates
        return {name: held}
    parts: list[Sequence[Tensor | None]] = [held.codes.chunk(len(gates))]
    for part in (held.scale, held.zero_point):
        parts.append((part,) * len(gates) if part is None or rows == 1 else part.chunk(len(gates)))
    return {f"{name}.{gate}": IntegerTensor(*of_gate) for gate, *of_gate in zip(gates, *parts, strict=True)}


def _bias(product: Product, bias: Tensor, held: IntegerTensor) -> IntegerTensor | str:
    """Return the bias in int32, or why it stays float."""
    step = _fixed_scale(product.input)
    if step is None:
        return "float: the input has no single fixed scale"
    channels = _scale_by_channel(product, held)
    if channels is None or bias.ndim != 1 or len(bias) % len(channels):
        return "float: the weight has no integer scale for each output channel"
    scale = (step.to(torch.float64) * channels.to(torch.float64)).to(torch.float32)
    scale = scale.repeat(len(bias) // len(channels))
    codes = (bias.detach().to(torch.float64) / scale).round_()
    if not codes.abs().max() <= _LARGEST_INT32:
        return "float: beyond int32"
    return IntegerTensor(codes.to(torch.int32), scale, None)


def _fixed_scale(quantizer: nn.Module | None) -> Tensor | None:
    """Return the scale of an integer grid that every call of a layer reads, if there is one."""
    if not isinstance(quantizer, TensorQuantizer) or not (quantizer.is_enabled and quantizer.needs_range):
        return None
    scale = None if quantizer.descriptor.is_float else quantizer.scale
    return scale.reshape(1) if scale is not None and scale.numel() == 1 else None


def _scale_by_channel(product: Product, held: IntegerTensor) -> Tensor | None:
    """Return the scale of each output channel of a weight, or that of all."""
    scale, axis = held.scale, product.channels
    if held.codes.is_floating_point():
        return None
    if scale.numel() == 1:
        return scale.reshape(1)
    if axis is None or scale.ndim != product.weight.ndim:
        return None
    size = product.weight.shape[axis]
    return scale.reshape(-1) if scale.shape[axis] == scale.numel() == size else None
