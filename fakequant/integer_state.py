"""The integers of a quantized model in the open: codes, scales and zero points of weights, and int32 biases."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fakequant.arithmetic import Codes, values_on
from fakequant.errors import CheckpointError, InvalidValueError, ValidationError
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import Weight, weights_of_quantizers
from fakequant.onnx_ops import container

_GATES = {nn.LSTM: "ifgo", nn.LSTMCell: "ifgo", nn.GRU: "rzn", nn.GRUCell: "rzn"}
"""The gates whose rows torch stacks in one weight, in its order."""

_SCALE, _ZERO_POINT = ".scale", ".zero_point"

_LARGEST_INT32 = 2**31 - 1


class IntegerTensor(NamedTuple):
    """A tensor as stored: ``value = (codes - zero_point) * scale``.

    Attributes:
        codes: int8, uint8, int16, uint16, int32 (a bias) or float8, shaped like the tensor.
        scale: float32; broadcasts against codes, or has one element a block.
        zero_point: of the codes' dtype, shaped like scale; None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class IntegerState(Mapping[str, IntegerTensor]):
    """{name of a parameter: its integers}.

    Args:
        tensors: by name.
        left_out: {name of a quantized parameter that is not here: why}.
    """

    def __init__(self, tensors: Mapping[str, IntegerTensor], left_out: Mapping[str, str]) -> None:
        self._tensors = dict(tensors)
        self.left_out = dict(left_out)

    def __getitem__(self, name: str) -> IntegerTensor:
        """Return one parameter."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many parameters there are."""
        return len(self._tensors)

    def __str__(self) -> str:
        """Return one line a parameter."""
        width = max(map(len, (*self, *self.left_out)), default=0)
        lines = [
            f"{name:<{width}}  {str(held.codes.dtype).removeprefix('torch.')} {tuple(held.codes.shape)}, "
            f"{held.scale.numel()} scale{'s' * (held.scale.numel() != 1)}"
            for name, held in self.items()
        ]
        return "\n".join([*lines, *(f"{name:<{width}}  {why}" for name, why in self.left_out.items())])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with ``<name>``, ``<name>.scale`` and ``<name>.zero_point``; whole or not at all."""
        stored = {}
        for name, held in self.items():
            parts = (("", held.codes), (_SCALE, held.scale), (_ZERO_POINT, held.zero_point))
            stored.update({name + suffix: part.cpu().contiguous() for suffix, part in parts if part is not None})
        file = Path(path)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_bytes(save(stored, metadata={"format": "fakequant.integers"}))
        temporary.replace(file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "IntegerState":
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: no safetensors file, or codes without a scale.
        """
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: expected a safetensors file of integers, got: {error}") from error
        names = [name for name in stored if not name.endswith((_SCALE, _ZERO_POINT))]
        if missing := [name for name in names if name + _SCALE not in stored]:
            raise CheckpointError(f"{path}: expected a scale for each tensor, got none for {', '.join(missing)}")
        return cls({n: IntegerTensor(stored[n], stored[n + _SCALE], stored.get(n + _ZERO_POINT)) for n in names}, {})


def integer_state(model: nn.Module) -> IntegerState:
    """Return the integers that every quantized layer stands for, as a file or an accelerator stores them.

    A weight has its own name (``layer1.0.conv1.weight``); each gate of an LSTM or GRU one of its own
    (``lstm.weight_ih_l0.i``; LSTM: i f g o, GRU: r z n). A bias is int32 with the scale of the input
    times that of the weight, where both are known; otherwise it stays float and is not here.

    Args:
        model: quantized and calibrated.

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
    names = {module: name for name, module in model.named_modules()}
    tensors: dict[str, IntegerTensor] = {}
    left_out: dict[str, str] = {}
    for quantizer, weight in weights_of_quantizers(model).items():
        name = f"{names[weight.module]}.{weight.name}".lstrip(".")
        if not quantizer.is_enabled:
            continue
        if quantizer.needs_range and not quantizer.is_calibrated:
            raise InvalidValueError(f"{name}: expected a calibrated quantizer, got one whose range is unknown")
        if quantizer.descriptor.num_bits == (2, 1):
            left_out[name] = "FP4 has no dtype in safetensors"
            continue
        held = _integers(quantizer, weight.tensor.detach())
        _check(name, held, quantizer, weight.tensor.detach())
        tensors.update(_by_gate(name, held, weight))
        bias = _bias(held, weight)
        if bias is not None:
            tensors[name.removesuffix("weight") + "bias"] = bias
    if not tensors and not left_out:
        raise InvalidValueError("model: expected at least one layer with a quantized weight, got none")
    return IntegerState(tensors, left_out)


def _integers(quantizer: TensorQuantizer, weight: Tensor) -> IntegerTensor:
    if quantizer.descriptor.is_float:
        scale = quantizer.scale
        assert scale is not None
        dtype = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}[quantizer.descriptor.num_bits]  # type: ignore[index]
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


def _by_gate(name: str, held: IntegerTensor, weight: Weight) -> dict[str, IntegerTensor]:
    gates = _GATES.get(weight.module.float_class, "")
    if not gates or "hr" in weight.name:
        return {name: held}
    parts = [held.codes.chunk(len(gates))]
    for shared in (held.scale, held.zero_point):
        is_split = shared is not None and shared.numel() > 1
        parts.append(shared.chunk(len(gates)) if is_split and shared is not None else (shared,) * len(gates))  # type: ignore[arg-type]
    return {f"{name}.{gate}": IntegerTensor(*of_gate) for gate, *of_gate in zip(gates, *parts, strict=True)}


def _bias(held: IntegerTensor, weight: Weight) -> IntegerTensor | None:
    """Return the bias in int32, None where the layer has none or its scale is not known."""
    module = weight.module
    bias = getattr(module, "bias", None)
    if weight.name != "weight" or not isinstance(bias, Tensor) or module.input_names != ("input",):
        return None
    quantizer = module.input_quantizer
    step = quantizer.scale if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled else None
    channels = held.scale.reshape(-1)
    if step is None or step.numel() > 1 or len(bias) % len(channels):
        return None
    scale = (step.reshape(1).to(torch.float64) * channels.to(torch.float64)).to(torch.float32)
    scale = scale.repeat(len(bias) // len(channels))
    codes = (bias.detach().to(torch.float64) / scale).round_()
    if codes.abs().max() > _LARGEST_INT32:
        return None
    return IntegerTensor(codes.to(torch.int32), scale, None)
