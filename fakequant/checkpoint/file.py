"""A quantized model as one safetensors file: its state, and its manifest in the header.

Tensors that are one, such as tied weights and the range of a shared quantizer, are stored
once, and the header says under which other names they go.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fakequant.arithmetic import is_range_shape
from fakequant.checkpoint.manifest import manifest_of
from fakequant.checkpoint.restore import quantize_like
from fakequant.convert import undone_on_error
from fakequant.errors import CheckpointError, FakeQuantError
from fakequant.nn.saved_ranges import check_range
from fakequant.nn.walk import named_quantizers, weights_of_quantizers
from fakequant.nn.wrappers import check_is_bare
from fakequant.retarget import every_target
from fakequant.tensor_file import check_path, json_object, read_tensors, write_tensors

_Model = TypeVar("_Model", bound=nn.Module)

_FORMAT = "fakequant.quantized"


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one file, from which ``load_quantized`` gives a float model the same quantizers.

    The file is a safetensors file with the whole state of the model. It appears whole or not at all. Not in it are
    hooks, such as those of ``quantize_gradients``, and what a calibration has collected.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model, such as DistributedDataParallel; no path.
        CheckpointError: a model without quantizers; a quantizer of a user's own class; a range that is none, or does
            not fit its grid or weight; a state that is more than tensors; a file that cannot be written.
        InvalidValueError: a model that ``fully_shard`` has split, or one of whose folded pairs a part was replaced.
    """
    check_path(path)
    manifest = manifest_of(model)
    _check_weights(model)
    for name, quantizer in named_quantizers(model):
        check_range(name, quantizer)
    state = model.state_dict(keep_vars=True)
    if wrong := _without_values(state):
        raise CheckpointError(f"model: expected a state of tensors with values, got others for {wrong[:5]}")
    ties = _ties(state)
    metadata = {"format": _FORMAT, "manifest": json.dumps(manifest, allow_nan=False), "ties": json.dumps(ties)}
    write_tensors(path, _apart({key: value for key, value in state.items() if key not in ties}), metadata)


def load_quantized(model: _Model, path: str | os.PathLike[str]) -> _Model:
    """Make a float model the quantized one that ``save_quantized`` wrote, in place; nothing of the file is executed.

    No example, recipe or data is needed. Mode and device stay those of the model. Quantizers that it has already,
    such as those of ``initialize``, are replaced. Quantized classes and ops of a user's own have to be registered.

    Args:
        model: built by the same code, with tensors of the dtypes in the file.
        path: of the file.

    Returns:
        The model.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model; no path.
        CheckpointError: no such file, or one of another kind; a module, shape or dtype that is not the saved one, with
            its name; a class or an op that is not registered. The model is unchanged after every error.
    """
    check_is_bare(model)
    check_path(path)
    try:
        saved = _read(path)
        if empty := _without_values(model.state_dict(keep_vars=True)):
            raise CheckpointError(f"model: expected tensors with values, got none, as on meta, for {empty[:5]}")
        with undone_on_error(model):
            quantize_like(model, saved.manifest)
            _load_ranges(model, saved.state)
            _check_state(model, saved)
            _check_weights(model)
            model.load_state_dict(saved.state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model


class _Saved(NamedTuple):
    """What a file holds; the state has the tied tensors under each of their names."""

    manifest: Mapping[str, Any]
    ties: Mapping[str, str]
    state: dict[str, Tensor]


def _without_values(state: Mapping[str, object]) -> list[str]:
    """Return the names of what is no tensor, or one on meta, or of a lazy layer."""
    return [key for key, value in state.items() if not isinstance(value, Tensor) or value.is_meta or is_lazy(value)]


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {another name of a tensor: its first name in alphabetical order}."""
    names = defaultdict(list)
    for key in sorted(state):
        names[id(state[key])].append(key)
    return {other: first for first, *others in names.values() for other in others}


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, none a view of the memory of another."""
    held: set[int] = set()
    apart = {}
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if memory in held else tensor
        held.add(memory)
    return apart


def _read(path: str | os.PathLike[str]) -> _Saved:
    state, metadata = read_tensors(path, _FORMAT, "save_quantized")
    manifest, ties = (json_object(metadata, name) for name in ("manifest", "ties"))
    for other, first in ties.items():
        if not isinstance(first, str) or other in state or first not in state:
            raise CheckpointError(f"ties: expected {other!r} for a tensor of another name, got {first!r}")
    return _Saved(manifest, ties, {**state, **{other: state[first] for other, first in ties.items()}})


def _load_ranges(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the new quantizers of a model their ranges, and check them: a bad one would be found when half is loaded."""
    for name, quantizer in named_quantizers(model):
        keys = {key: f"{name}.{key}" for key in quantizer.range_keys}
        ends = {key: state[stored] for key, stored in keys.items() if stored in state}
        shapes = {tuple(end.shape) for end in ends.values()}
        grid = quantizer.descriptor
        if len(shapes) > 1 or not all(is_range_shape(grid, shape) for shape in shapes):
            raise CheckpointError(f"{name}: expected one shape of both ends that fits {grid}, got {sorted(shapes)}")
        try:
            quantizer.load_state_dict(ends)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: {error}") from error


def _check_state(model: nn.Module, saved: _Saved) -> None:
    """Check that the state of the model, now quantized, is of the names, ties, shapes and dtypes of the saved one."""
    state = model.state_dict(keep_vars=True)
    absent = [key for key in state if key not in saved.state]
    unknown = [key for key in saved.state if key not in state]
    if absent or unknown:
        raise CheckpointError(f"expected the state of the model, got no {absent[:5]}, and {unknown[:5]} besides")
    ties = _ties(state)
    if wrong := sorted(ties.items() ^ saved.ties.items()):
        raise CheckpointError(f"model: expected the tied tensors {dict(saved.ties)}, got another tie for {wrong[:5]}")
    for key, value in state.items():
        found, expected = ((tuple(tensor.shape), tensor.dtype) for tensor in (value, saved.state[key]))
        if found != expected:
            raise CheckpointError(f"{key}: expected {expected} in the model, as saved, got {found}")


def _check_weights(model: nn.Module) -> None:
    """Check that the ranges of weights fit them."""
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    with every_target(model):
        for quantizer, weight in weights_of_quantizers(model).items():
            try:
                quantizer.checked(weight.tensor.detach())
            except FakeQuantError as error:
                raise CheckpointError(f"{names[quantizer]}: {error}") from error
