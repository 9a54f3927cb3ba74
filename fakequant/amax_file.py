"""Ranges in a file of their own, {quantizer name: amax} as safetensors: calibrate once, reuse everywhere.

The lower end of an affine range is beside it, as ``<name>.amin``.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fakequant.arithmetic import range_shape
from fakequant.errors import CheckpointError, InvalidValueError
from fakequant.nn.walk import named_quantizers, weights_of_quantizers

AMIN = ".amin"


def save_amax(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the amax of every calibrated quantizer. The file appears whole or not at all.

    Raises:
        CheckpointError: no quantizer of the model is calibrated.
    """
    ranges = {}
    for name, quantizer in named_quantizers(model):
        for suffix, end in zip(("", AMIN), quantizer.ends, strict=True):
            if end is not None:
                ranges[name + suffix] = end.cpu().contiguous()
    if not ranges:
        raise CheckpointError("model: expected at least one calibrated quantizer, got none")
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(save(ranges, metadata={"format": "fakequant.amax"}))
    temporary.replace(target)


def load_amax(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Set the amax of a model's quantizers from a file that ``save_amax`` wrote.

    Args:
        model: quantized the same way.
        path: of the file.
        strict: the names in the file and the enabled quantizers must be the same; otherwise those in both are set.

    Raises:
        CheckpointError: the file is no safetensors file; names do not match (all are named); a weight's range
            has another shape than its channels. Nothing is changed.
        InvalidValueError: a range is not finite, or negative.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file of ranges, got: {error}") from error
    lower = {name.removesuffix(AMIN): end for name, end in stored.items() if name.endswith(AMIN)}
    ranges = {name: (end, lower.get(name)) for name, end in stored.items() if not name.endswith(AMIN)}
    quantizers = dict(named_quantizers(model))
    if strict:
        missing = [name for name, q in quantizers.items() if q.is_enabled and q.needs_range and name not in ranges]
        unknown = [name for name in ranges if name not in quantizers]
        if missing or unknown:
            raise CheckpointError(f"{path}: no range for {missing}; no quantizer for {unknown}")
    shapes = {q: range_shape(q.descriptor, weight.tensor.shape) for q, weight in weights_of_quantizers(model).items()}
    for name, (amax, _) in ranges.items():
        shape = shapes.get(quantizers[name]) if name in quantizers else None
        if shape is not None and amax.shape not in (shape, ()):
            raise CheckpointError(f"{path}: {name}: expected a range of shape {shape}, got {tuple(amax.shape)}")
    before = {name: quantizers[name].ends for name in ranges if name in quantizers}
    try:
        for name in before:
            quantizers[name].replace_range(*ranges[name])
    except InvalidValueError as error:
        for other, ends in before.items():
            if ends[0] is None:
                quantizers[other].amax = None
            else:
                quantizers[other].replace_range(*ends)
        raise InvalidValueError(f"{path}: {name}: {error}") from None
