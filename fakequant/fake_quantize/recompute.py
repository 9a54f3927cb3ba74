"""Recomputing quantized tensors in backward: what a layer would keep follows from what its quantizer keeps.

For its gradient a layer keeps its quantized input and weight, and the quantizer keeps what it quantized,
which a float model keeps too: the weight itself, an activation that the layer before has saved. Inside
``recompute_quantized`` only the latter is kept; in backward the same function makes the former of it again,
so that no bit of a gradient changes, and copies of activations and weights last no longer than the
layer's own forward and backward pass.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter


class _Origin(NamedTuple):
    """How a quantizer's result came to be; inputs as ``_pack`` returned them."""

    version: int
    function: type[Function]
    inputs: Sequence[Any]


class _Recomputed(NamedTuple):
    """A tensor that lies in the memory of a quantizer's result."""

    origin: _Origin
    place: tuple[Any, ...]
    """Size, stride and offset, as ``as_strided`` takes them."""


class _Kept(NamedTuple):
    """A tensor as it is, and its version: with hooks torch leaves it to them to notice that it was changed."""

    tensor: Tensor
    version: int


class _Running(threading.local):
    """What this thread is inside of."""

    def __init__(self) -> None:
        self.innermost: recompute_quantized | None = None


_running = _Running()


class recompute_quantized(saved_tensors_hooks):  # noqa: N801 - a context manager, named like those of torch
    """Inside, layers keep no quantized tensor for backward that its quantizer can make again.

    >>> x = torch.randn(3, requires_grad=True)
    >>> with recompute_quantized():
    ...     loss = x.square().sum()
    >>> loss.backward()
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._origins: dict[StorageWeakRef, _Origin] = {}
        self._outer: recompute_quantized | None = None

    def __enter__(self) -> None:
        """Begin."""
        super().__enter__()
        self._outer, _running.innermost = _running.innermost, self

    def __exit__(self, *args: object) -> None:
        """End, and let go of whatever nobody saved."""
        super().__exit__(*args)
        _running.innermost, self._outer = self._outer, None
        self._origins.clear()

    def note(self, result: Tensor, function: type[Function], inputs: Sequence[Any]) -> None:
        """Remember that result is ``function.apply(*inputs)``."""
        packed = tuple(self._pack(v) if isinstance(v, Tensor) else v for v in inputs)
        self._origins[StorageWeakRef(result.untyped_storage())] = _Origin(result._version, function, packed)

    def _pack(self, tensor: Tensor) -> _Kept | _Recomputed:
        if type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided:
            origin = self._origins.get(StorageWeakRef(tensor.untyped_storage()))
            if origin is not None and origin.version == tensor._version:
                return _Recomputed(origin, (tensor.size(), tensor.stride(), tensor.storage_offset()))
        return _Kept(tensor.detach(), tensor._version)


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
    result: Tensor = packed.origin.function.apply(*inputs)
    return result.as_strided(*packed.place)


def apply(function: type[Function], *inputs: Any) -> Tensor:
    """Return ``function.apply(*inputs)``, which inside ``recompute_quantized`` can be made again of inputs."""
    result: Tensor = function.apply(*inputs)
    if not torch.compiler.is_compiling() and result.requires_grad and _running.innermost is not None:
        _running.innermost.note(result, function, inputs)
    return result
