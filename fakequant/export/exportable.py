"""What a model must be before it can be exported; each error names every quantizer concerned."""

from collections.abc import Mapping

import torch
from torch import nn

from fakequant.errors import ExportError
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers, weights_of_quantizers
from fakequant.onnx_ops import channel_axis


def check_not_calibrating(model: nn.Module) -> None:
    """Raise ExportError if a quantizer still collects statistics."""
    if collecting := [name for name, q in named_quantizers(model) if q._if_calib and not q._disabled]:
        raise ExportError(
            f"expected no quantizer to collect statistics: call disable_calib() on {', '.join(collecting)}"
        )


def check_quantizers(quantizers: Mapping[str, TensorQuantizer], opset: int) -> None:
    """Raise ExportError for enabled quantizers without a range, or with a grid that no file of this opset holds."""
    if unknown := [name for name, quantizer in quantizers.items() if not quantizer.is_calibrated]:
        raise ExportError(
            f"{len(unknown)} of {len(quantizers)} quantizers are not calibrated: {', '.join(unknown)}. "
            "Call fakequant.calibrate, or disable() those that should stay float"
        )
    if codes := [name for name, quantizer in quantizers.items() if not quantizer.fake_quant]:
        raise ExportError(f"expected quantizers with fake_quant=True, got codes from {', '.join(codes)}")
    for name, quantizer in quantizers.items():
        assert quantizer.scale is not None
        try:
            channel_axis(quantizer.scale)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from None
    needed = {name: _opset_of(quantizer.num_bits) for name, quantizer in quantizers.items()}
    if newer := [f"{name} ({quantizers[name].num_bits} bits: {n})" for name, n in needed.items() if n > opset]:
        raise ExportError(f"opset: expected {max(needed.values())} or later, got {opset}, for {', '.join(newer)}")


def _opset_of(num_bits: int | tuple[int, int]) -> int:
    """Return the first opset whose QuantizeLinear has a type for the codes; 13 is the first with a channel axis."""
    if isinstance(num_bits, tuple):
        return 19
    return 13 if num_bits <= 8 else 21


def check_weights(model: nn.Module) -> None:
    """Raise ExportError for quantized weights that are not float32."""
    names = {module: name for name, module in model.named_modules()}
    other = [
        f"{names[weight.module]}.{weight.name} ({weight.tensor.dtype})".lstrip(".")
        for quantizer, weight in weights_of_quantizers(model).items()
        if quantizer.is_enabled and weight.tensor.dtype != torch.float32
    ]
    if other:
        raise ExportError(
            f"expected float32 weights, got {', '.join(other)}. Export a copy made float by model.float(): "
            "the ranges stay, and the runtime chooses the precision of what is not quantized"
        )
