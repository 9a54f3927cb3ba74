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
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter


class _Origin(NamedTuple):
    """How a quantizer's result came to be; inputs as ``_pack`` returned them."""

    function: Callable[..., Tensor]
    inputs: Sequence[Any]


class _Result(NamedTuple):
    """What tells a quantizer's result, and a copy of it in another dtype, without holding on to them."""

    origin: _Origin
    version: int
    stride: tuple[int, ...]
    node: Node | None


class _Recomputed(NamedTuple):
    """A tensor that lies in the memory of a quantizer's result, or of a copy of that in another dtype."""

    origin: _Origin
    device: torch.device
    dtype: torch.dtype
    place: tuple[Any, ...]
    """Size, stride and offset, as ``as_strided`` takes them."""


class _Kept(NamedTuple):
    """A tensor as it is, and its version: with hooks torch leaves it to them to notice that it was changed."""

    tensor: Tensor
    version: int


def recompute_quantized() -> contextlib.AbstractContextManager[object]:
    """Return a context inside which nothing is kept for backward that a quantizer can make again.

    It does nothing where others decide what is kept: inside another such context, a non-reentrant
    checkpoint or ``torch.autograd.graph.save_on_cpu``, and while compiling or tracing.

    >>> x = torch.randn(3, requires_grad=True)
    >>> with recompute_quantized():
    ...     loss = x.square().sum()
    >>> loss.backward()
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return contextlib.nullcontext()
    return _Recomputing() if torch.is_grad_enabled() and _hooks() is None else contextlib.nullcontext()


class _Recomputing(saved_tensors_hooks):
    """What ``recompute_quantized`` returns where it does something."""

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._results: dict[StorageWeakRef, _Result] = {}

    def __exit__(self, *args: object) -> None:
        """End, and let go of whatever nobody saved."""
        super().__exit__(*args)
        self._results.clear()

    def note(self, result: Tensor, function: Callable[..., Tensor], x: Tensor, grid: Sequence[Any]) -> None:
        """Remember that result is ``function(x, *grid)``."""
        # A learned range is copied: fully_shard frees it, if it has a group of its own, until its own backward pass.
        values = [v.detach().clone() if isinstance(v, Tensor) and v.requires_grad else v for v in grid]
        origin = _Origin(function, [self._pack(v) if isinstance(v, Tensor) else v for v in (x, *values)])
        noted = _Result(origin, result._version, result.stride(), result.grad_fn)
        self._results[StorageWeakRef(result.untyped_storage())] = noted

    def forget(self, result: Tensor) -> None:
        """Keep a result like any other tensor."""
        self._results.pop(StorageWeakRef(result.untyped_storage()), None)

    def _pack(self, tensor: Tensor) -> _Kept | _Recomputed:
        result = None
        if type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided:
            result = self._result_in(tensor) or self._result_copied_to(tensor)
        if result is None:
            return _Kept(tensor.detach(), tensor._version)
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        return _Recomputed(result.origin, tensor.device, tensor.dtype, place)

    def _result_in(self, tensor: Tensor) -> _Result | None:
        """Return the unchanged result in whose memory a tensor lies."""
        found = self._results.get(StorageWeakRef(tensor.untyped_storage()))
        return found if found is not None and found.version == tensor._version else None

    def _result_copied_to(self, tensor: Tensor) -> _Result | None:
        """Return the result of which a tensor is, or shows a part of, the copy that autocast makes for a product."""
        copy = tensor._base if tensor._is_view() else tensor
        if copy is None or copy._version or copy.grad_fn is None or copy.grad_fn.name() != "ToCopyBackward0":
            return None
        copied = copy.grad_fn.next_functions[0][0]
        return next((r for r in self._results.values() if r.node is copied and r.stride == copy.stride()), None)


def _unpack(packed: _Kept | _Recomputed) -> Tensor:
    if isinstance(packed, _Kept):
        if packed.tensor._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{packed.tensor.type()} {list(packed.tensor.shape)}, expected version {packed.version}, "
                f"got {packed.tensor._version}"
            )
        return packed.tensor
    inputs = [_unpack(v) if isinstance(v, _Kept | _Recomputed) else v for v in packed.origin.inputs]
    return packed.origin.function(*inputs).to(packed.device, packed.dtype).as_strided(*packed.place)


def apply(function: type[Function], x: Tensor, *grid: Any) -> Tensor:
    """Return ``function.apply(x, *grid)``, which inside ``recompute_quantized`` can be made again."""
    result: Tensor = function.apply(x, *grid)
    if result.requires_grad and (recomputing := _active()) is not None:
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
