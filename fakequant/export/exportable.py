"""What a model must be before it can be exported; each error names every quantizer concerned."""

from collections.abc import Mapping

import torch
from torch import nn

from fakequant.errors import ExportError
from fakequant.export.targets.accepts import opset_needed
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers, weights_of_quantizers
from fakequant.onnx_ops import channel_axis


def check_not_calibrating(model: nn.Module) -> None:
    """Raise ExportError if a quantizer still collects statistics."""
    if collecting := [name for name, q in named_quantizers(model) if q.is_collecting]:
        raise ExportError(
            f"expected no quantizer to collect statistics: call disable_calib() on {', '.join(collecting)}"
        )


def check_quantizers(quantizers: Mapping[str, TensorQuantizer]) -> None:
    """Raise ExportError for enabled quantizers without a range, or with one that no file holds."""
    if unknown := [name for name, q in quantizers.items() if q.needs_range and not q.is_calibrated]:
        raise ExportError(
            f"{len(unknown)} of {len(quantizers)} quantizers are not calibrated: {', '.join(unknown)}. "
            "Call fakequant.calibrate, or disable() those that should stay float"
        )
    broken = [name for name, q in quantizers.items() if q.scale is not None and not q.scale.isfinite().all()]
    if broken:
        raise ExportError(
            f"expected finite ranges, got NaN or Inf in {', '.join(broken)}. Calibrate anew on finite data"
        )
    if codes := [name for name, quantizer in quantizers.items() if not quantizer.fake_quant]:
        raise ExportError(f"expected quantizers with fake_quant=True, got codes from {', '.join(codes)}")
    for name, quantizer in quantizers.items():
        if quantizer.scale is not None and quantizer.descriptor.block_size is None:
            try:
                channel_axis(quantizer.scale)
            except ExportError as error:
                raise ExportError(f"{name}: {error}") from None


def check_opset(quantizers: Mapping[str, TensorQuantizer], opset: int) -> None:
    """Raise ExportError for quantizers whose grids no file of this opset holds."""
    needed = {name: opset_needed(quantizer.descriptor) for name, quantizer in quantizers.items()}
    if newer := [f"{name} ({quantizers[name].num_bits} bits: {n})" for name, n in needed.items() if n > opset]:
        raise ExportError(f"opset: expected {max(needed.values())} or later, got {opset}, for {', '.join(newer)}")


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
