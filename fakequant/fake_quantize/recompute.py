"""Recomputing quantized tensors in backward: what a layer would keep follows from what its quantizer keeps.

For its gradient a layer keeps its quantized input and weight, and the quantizer keeps what it quantized,
which a float model keeps too: the weight itself, an activation that the layer before has saved. Inside
``recompute_quantized``, which every quantized layer and call enters, only the latter is kept. In backward
the same function makes the former of it again, so that no bit of a gradient changes, and a copy lasts no
longer than the layer's own forward and backward pass. Weights are an exception, see ``keep``.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

SMALL = 2**15
"""Elements. Results with fewer are kept: making them again would take longer than their memory is worth."""


class _Kept(NamedTuple):
    """A tensor as it is, and its version: with hooks torch leaves it to them to notice that it was changed."""

    tensor: Tensor
    version: int


class _Origin(NamedTuple):
    """How a quantizer's result came to be."""

    function: Callable[..., Tensor]
    x: "_Kept | _Recomputed"
    grid: Sequence[Any]


class _Recomputed(NamedTuple):
    """A tensor that lies in the memory of a quantizer's result, or of a copy of that in another dtype."""

    origin: _Origin
    device: torch.device
    dtype: torch.dtype
    place: tuple[Any, ...]
    """Size, stride and offset, as ``as_strided`` takes them."""


class _Result(NamedTuple):
    """A quantizer's result, as it was when it was made."""

    tensor: Tensor
    version: int
    storage: int
    origin: _Origin

    def is_in(self, tensor: Tensor, storage: int) -> bool:
        """Whether a tensor with that storage shows it, or a part of it, unchanged."""
        is_same = storage == self.storage and tensor._version == self.version
        return is_same and tensor.dtype == self.tensor.dtype and not tensor.is_neg()

    def is_copied_to(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or shows a part of, the copy of it that autocast makes for a product."""
        if tensor.dtype == self.tensor.dtype:
            return False
        copy = tensor._base if tensor._is_view() else tensor
        if copy is None or copy.grad_fn is None or copy.grad_fn.name() != "ToCopyBackward0":
            return False
        if copy.grad_fn.next_functions[0][0] is not self.tensor.grad_fn or copy.stride() != self.tensor.stride():
            return False
        is_unchanged = self.is_in(self.tensor, self.tensor.untyped_storage()._cdata) and not copy._version
        return is_unchanged and tensor.dtype == copy.dtype and not tensor.is_neg()


def recompute_quantized() -> contextlib.AbstractContextManager[object]:
    """Return a context inside which nothing is kept for backward that a quantizer can make again, unless it is small.

    It does nothing where others decide what is kept: inside a non-reentrant checkpoint,
    ``torch.autograd.graph.save_on_cpu`` or a transform of torch.func, and while compiling or tracing.

    >>> x = torch.randn(3, requires_grad=True)
    >>> with recompute_quantized():
    ...     loss = x.square().sum()
    >>> loss.backward()
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    are_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if not are_allowed or (_hooks() is not None and _active() is None):
        return contextlib.nullcontext()
    return _Recomputing()


class _Recomputing:
    """What ``recompute_quantized`` returns where it does something."""

    def __init__(self) -> None:
        self._results: list[_Result] = []

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)
        del self._hooks  # which refers to this
        self._results.clear()

    def note(self, result: Tensor, function: Callable[..., Tensor], x: Tensor, grid: Sequence[Any]) -> None:
        """Remember that result is ``function(x, *grid)``, unless it is small."""
        if result.numel() < SMALL:
            return
        origin = _Origin(function, self._pack(x), [_held(v) for v in grid])
        self._results.append(_Result(result, result._version, result.untyped_storage()._cdata, origin))

    def forget(self, result: Tensor) -> None:
        """Keep a result like any other tensor."""
        if self._results:
            storage = result.untyped_storage()._cdata
            self._results = [r for r in self._results if r.storage != storage]

    def _pack(self, tensor: Tensor) -> _Kept | _Recomputed:
        if self._results and type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()._cdata
            for result in self._results:
                if result.is_in(tensor, storage) or result.is_copied_to(tensor):
                    place = tensor.size(), tensor.stride(), tensor.storage_offset()
                    return _Recomputed(result.origin, tensor.device, tensor.dtype, place)
        return _Kept(tensor.detach(), tensor._version)


def _held(value: Any) -> Any:
    """Return a part of a grid as it is now: fully_shard frees a range in a group of its own until its own backward."""
    if not isinstance(value, Tensor):
        return value
    is_parameter = isinstance(value._base if value._is_view() else value, Parameter)
    return value.detach().clone() if is_parameter else value.detach()


def _unpack(packed: _Kept | _Recomputed) -> Tensor:
    if isinstance(packed, _Recomputed):
        result = packed.origin.function(_unpack(packed.origin.x), *packed.origin.grid)
        return result.to(packed.device, packed.dtype).as_strided(*packed.place)
    if packed.tensor._version != packed.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{packed.tensor.type()} {list(packed.tensor.shape)}, expected version {packed.version}, "
            f"got {packed.tensor._version}"
        )
    return packed.tensor


def apply(function: type[Function], x: Tensor, *grid: Any) -> Tensor:
    """Return ``function.apply(x, *grid)``, which inside ``recompute_quantized`` can be made again."""
    result: Tensor = function.apply(x, *grid)
    if (recomputing := _active()) is not None:
        recomputing.note(result, function.apply, x, grid)
    return result


def keep(quantized: Tensor) -> None:
    """Keep the result of a quantizer also inside ``recompute_quantized``: memory, where the other costs time."""
    if (recomputing := _active()) is not None:
        recomputing.forget(quantized)


def _active() -> _Recomputing | None:
    """Return whose hooks save tensors, if they are those of ``recompute_quantized``."""
    if torch.compiler.is_compiling():
        return None
    hooks = _hooks()
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, _Recomputing) else None


def _hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the hooks that save tensors now, and give them back. Only a private function of torch tells."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
