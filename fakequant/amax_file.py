"""Ranges in a file of their own, {quantizer name: amax} as safetensors: calibrate once, reuse everywhere.

The lower end of an affine range is beside it, as ``<name>.amin``. The header says which batch norms were
folded: the weight of a layer, and so its range, is another one with its norm.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from fakequant.arithmetic import is_range_shape, range_shape
from fakequant.errors import CheckpointError, InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.folded_layers import folded_pairs
from fakequant.nn.saved_ranges import check_range
from fakequant.nn.walk import named_quantizers, weights_of_quantizers
from fakequant.nn.wrappers import check_is_unwrapped
from fakequant.tensor_file import check_path, json_object, read_tensors, write_tensors

AMIN = ".amin"

_FORMAT = "fakequant.amax"
_FOLDED = "folded"

Ranges: TypeAlias = Mapping[str, tuple[Tensor, Tensor | None]]
"""{name of a quantizer: (amax, amin)}; amin is None on a symmetric grid."""


def save_amax(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the amax of every calibrated quantizer. The file appears whole or not at all.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model, such as DistributedDataParallel; no path.
        InvalidValueError: a learned range that ``fully_shard`` has split; a folded pair of which a part was replaced.
        CheckpointError: no quantizer of the model is calibrated; a range that is none, or on meta; a file that
            cannot be written.
    """
    check_is_unwrapped(model)
    check_path(path)
    quantizers = dict(named_quantizers(model))
    _check_has_values(quantizers)
    ranges = {}
    for name, quantizer in quantizers.items():
        ends = quantizer.ends
        check_range(name, quantizer)
        for suffix, end in zip(("", AMIN), ends, strict=True):
            if end is not None:
                ranges[name + suffix] = end.cpu().contiguous()
    if not ranges:
        raise CheckpointError("model: expected at least one calibrated quantizer, got none")
    write_tensors(path, ranges, {"format": _FORMAT, _FOLDED: json.dumps(folded_pairs(model))})


def load_amax(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Set the amax of a model's quantizers from a file that ``save_amax`` wrote.

    Args:
        model: quantized the same way, with the same batch norms folded.
        path: of the file.
        strict: the names in the file and the enabled quantizers must be the same; otherwise those in both are set.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model; no path.
        CheckpointError: no such file, or one of another kind; names do not match (all are named), or none is in
            both; a range whose shape fits not the grid, or not the weight; other folded batch norms; a model on meta.
            Nothing is changed.
        InvalidValueError: a range is not finite, or negative. Nothing is changed.
    """
    check_is_unwrapped(model)
    check_path(path)
    quantizers = dict(named_quantizers(model))
    try:
        tensors, metadata = read_tensors(path, _FORMAT, "save_amax")
        _check_has_values(quantizers)
        ranges = _in_both(_as_ranges(tensors), quantizers, strict)
        _check_folded(model, metadata, ranges)
        _check_shapes(model, quantizers, ranges)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _replace(quantizers, ranges, path)


def _as_ranges(tensors: Mapping[str, Tensor]) -> Ranges:
    lower = {name.removesuffix(AMIN): end for name, end in tensors.items() if name.endswith(AMIN)}
    return {name: (end, lower.get(name)) for name, end in tensors.items() if not name.endswith(AMIN)}


def _in_both(ranges: Ranges, quantizers: Mapping[str, TensorQuantizer], strict: bool) -> Ranges:
    """Return the ranges of the quantizers that there are."""
    unknown = [name for name in ranges if name not in quantizers]
    if strict:
        missing = [name for name, q in quantizers.items() if q.is_enabled and q.needs_range and name not in ranges]
        if missing or unknown:
            raise CheckpointError(f"no range for {missing}; no quantizer for {unknown}")
    if len(unknown) == len(ranges):
        raise CheckpointError(f"expected a range for a quantizer of the model, got ranges for {unknown[:5]}")
    return {name: ends for name, ends in ranges.items() if name in quantizers}


def _check_has_values(quantizers: Mapping[str, TensorQuantizer]) -> None:
    if empty := [name for name, quantizer in quantizers.items() if quantizer._amax.is_meta]:
        raise CheckpointError(f"model: expected tensors with values, got none, as on meta, for {empty[:5]}")


def _check_folded(model: nn.Module, metadata: Mapping[str, str], names: Iterable[str]) -> None:
    """Check that the layers of these quantizers have the folded batch norms of the file."""
    layers = {name.rpartition(".")[0] for name in names}
    there, here = (layers & set(pairs) for pairs in (json_object(metadata, _FOLDED), folded_pairs(model)))
    if there != here:
        raise CheckpointError(
            f"model: expected batch norms folded into {sorted(there)[:5]}, as in the file, got {sorted(here)[:5]}; "
            f"they differ in {sorted(there ^ here)[:5]}: call fold_batchnorm or unfold_batchnorm"
        )


def _check_shapes(model: nn.Module, quantizers: Mapping[str, TensorQuantizer], ranges: Ranges) -> None:
    shapes = {q: range_shape(q.descriptor, weight.tensor.shape) for q, weight in weights_of_quantizers(model).items()}
    for name, (amax, _) in ranges.items():
        shape, grid = shapes.get(quantizers[name]), quantizers[name].descriptor
        if shape is not None and amax.shape not in (shape, ()):
            raise CheckpointError(f"{name}: expected a range of shape {shape}, got {tuple(amax.shape)}")
        if not is_range_shape(grid, amax.shape):
            raise CheckpointError(f"{name}: expected a range whose shape fits {grid}, got {tuple(amax.shape)}")


def _replace(quantizers: Mapping[str, TensorQuantizer], ranges: Ranges, path: str | os.PathLike[str]) -> None:
    """Set all ranges, or none."""
    before = {name: quantizers[name].ends for name in ranges}
    try:
        for name, ends in ranges.items():
            quantizers[name].replace_range(*ends)
    except InvalidValueError as error:
        for other, old in before.items():
            if old[0] is None:
                quantizers[other].amax = None
            else:
                quantizers[other].replace_range(*old)
        raise InvalidValueError(f"{path}: {name}: {error}") from None
