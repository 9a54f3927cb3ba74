"""The torch side of a comparison with a file: a batch through the model, with the codes of its quantizers."""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fakequant.arithmetic import Codes
from fakequant.batches import model_arguments
from fakequant.errors import InvalidTypeError, InvalidValueError, ValidationError
from fakequant.export.cut_graph import Cut
from fakequant.export.graph import TARGET_KEY
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers
from fakequant.retarget import targeted

_SAME = "Is this the model that was exported?"


@dataclasses.dataclass(frozen=True)
class TorchRun:
    """One batch in the torch model.

    Args:
        feeds: the inputs of the file, in its types.
        outputs: of the model.
        codes: what the quantizer of each cut gave, in the type of the file's codes, by the names of ``Cut.given``.
        called: names of the enabled quantizers that the model called, in order.
    """

    feeds: dict[str, NDArray[Any]]
    outputs: tuple[NDArray[Any], ...]
    codes: dict[str, NDArray[Any]]
    called: tuple[str, ...]


class TorchSide:
    """A model beside its file.

    Args:
        file: what errors name.
        exported: the file's graph, cut or not.
        cuts: where it is or may be cut: the quantizers whose codes to record.
        inputs: returns the positional arguments of the model for a batch of another kind.
    """

    def __init__(
        self,
        file: Path,
        exported: ir.Model,
        cuts: Sequence[Cut],
        inputs: Callable[[Any], tuple[Any, ...]] | None,
    ) -> None:
        self._file = file
        self._target = exported.metadata_props.get(TARGET_KEY)
        given = {name for cut in cuts for name in cut.given}
        inputs_of_file = (v for v in exported.graph.inputs if not v.is_initializer() and v.name not in given)
        self._types = {str(value.name): value.dtype for value in inputs_of_file}
        self._cuts = cuts
        self._inputs = inputs

    @contextlib.contextmanager
    def as_exported(self, model: nn.Module) -> Iterator[None]:
        """Put a model into the state that the file was made from, for a with block.

        Raises:
            ValidationError: the file is for a target that is not known, or has quantizers that the model has not.
        """
        names = {name for name, _ in named_quantizers(model)}
        if unknown := dict.fromkeys(cut.quantizer for cut in self._cuts if cut.quantizer not in names):
            raise ValidationError(
                f"{self._file}: expected quantizers that the model has, got {', '.join(unknown)}. {_SAME}"
            )
        with contextlib.ExitStack() as stack:
            if self._target is not None:
                try:
                    stack.enter_context(targeted(model, self._target))
                except InvalidValueError as error:
                    raise ValidationError(f"{self._file}: {error} in its metadata") from None
            stack.enter_context(evaluating(model))
            yield

    def run(self, model: nn.Module, batch: Any) -> TorchRun:
        """Run a model that is ``as_exported``.

        Raises:
            InvalidTypeError: a batch of another kind, and no ``inputs``.
            ValidationError: a quantizer of the file is disabled, not calibrated, or not called; all of these are named.
        """
        try:
            args, kwargs = (self._inputs(batch), {}) if self._inputs else model_arguments(batch)
        except InvalidTypeError as error:
            raise InvalidTypeError(f"{error}. Pass inputs=lambda batch: (...)") from None
        with _recording(model, self._cuts) as (codes, calls):
            outputs = model(*args, **kwargs)
        if missing := [cut.name for cut in self._cuts if cut.given[0] not in codes]:
            raise ValidationError(
                f"{self._file}: expected the model to call every quantizer as in the file, got no "
                f"{', '.join(missing)}. {_SAME}"
            )
        enabled = {name for name, quantizer in named_quantizers(model) if quantizer.is_enabled}
        return TorchRun(
            feeds=self._feeds(args, kwargs),
            outputs=tuple(_arrays(pytree.tree_leaves(outputs))),
            codes=codes,
            called=tuple(name for name in calls if name in enabled),
        )

    def _feeds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        feeds = dict(zip(self._types, _arrays(pytree.tree_leaves(args)), strict=False))
        feeds |= {name: _array(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
        for name, dtype in self._types.items():
            if name in feeds and dtype is not None:
                feeds[name] = feeds[name].astype(dtype.numpy(), copy=False)
        return feeds


def check_shapes(where: object, expected: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> None:
    """Raise ValidationError unless arrays of the file have the shapes of those of the model."""
    shapes = [array.shape for array in expected], [array.shape for array in got]
    if shapes[0] != shapes[1]:
        raise ValidationError(f"{where}: expected outputs of shapes {shapes[0]} as in torch, got {shapes[1]}")


@contextlib.contextmanager
def _recording(model: nn.Module, cuts: Iterable[Cut]) -> Iterator[tuple[dict[str, NDArray[Any]], Counter[str]]]:
    """Record the codes at the cuts, and count the calls of every quantizer."""
    codes: dict[str, NDArray[Any]] = {}
    calls: Counter[str] = Counter()
    wanted: defaultdict[tuple[str, int], list[Cut]] = defaultdict(list)
    for cut in cuts:
        wanted[cut.quantizer, cut.call].append(cut)

    def record(name: str, quantizer: TensorQuantizer, tensor: Tensor) -> None:
        here = wanted.get((name, calls[name]), [])
        calls[name] += 1
        for cut in here:
            if not quantizer.is_enabled or (quantizer.needs_range and not quantizer.is_calibrated):
                raise ValidationError(f"{name}: expected it calibrated and enabled as in the file, got {quantizer}")
            codes.update(zip(cut.given, _as_in_file(cut, quantizer.codes_of(tensor)), strict=True))

    hooks = [
        quantizer.register_forward_hook(lambda module, args, _, name=name: record(name, module, args[0]))
        for name, quantizer in named_quantizers(model)
    ]
    try:
        yield codes, calls
    finally:
        for hook in hooks:
            hook.remove()


def _as_in_file(cut: Cut, found: Codes) -> Iterator[NDArray[Any]]:
    """Yield the codes, and scale and zero point where the file computes them."""
    zeros = np.zeros(()) if found.zero_point is None else _array(found.zero_point)
    shift = 0 if cut.zero_point is None else cut.zero_point - zeros
    yield np.asarray(_array(found.codes) + shift, cut.dtype)  # asarray: a sum of 0-d arrays is no array
    if cut.scale is None:
        yield _array(found.scale)
    if cut.zero_point is None:
        yield zeros.astype(cut.dtype)


def _arrays(leaves: Iterable[Any]) -> list[NDArray[Any]]:
    return [_array(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    array: NDArray[np.generic] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
