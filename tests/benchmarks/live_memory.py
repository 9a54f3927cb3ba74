"""How much memory tensors hold, counted from the operators that made them: the same on every machine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Watch(TorchDispatchMode):
    """Remembers the memory of every operator's results, and the most that was alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {v.untyped_storage()._cdata for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in views:
                storage = tensor.untyped_storage()
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Return the bytes that are still held, of what was made here."""
        self._made = {made: size for made, size in self._made.items() if not made.expired()}
        return sum(self._made.values())


class StepMemory(NamedTuple):
    """Bytes that a training step allocates beside what was there before."""

    kept: int
    """Alive between forward and backward."""
    peak: int
    """The most at a time."""


def step_memory(forward: Callable[[], Tensor]) -> StepMemory:
    """Return what one forward and backward pass of a loss needs; its gradients count from when they are made."""
    with _Watch() as watch:
        loss = forward()
        kept = watch.alive()
        torch.autograd.backward(loss)
    return StepMemory(kept, watch.peak)


def kept_when_compiled(model: nn.Module, x: Tensor) -> int:
    """Return the bytes, beside those of the model and of x, that the compiled model keeps between forward and backward.

    What compiled code makes is out of sight of ``step_memory``; what it saves is not.
    """
    forward = torch.compile(model, fullgraph=True)
    forward(x).square().mean().backward()
    given = {v.untyped_storage().data_ptr() for v in (x, *model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = forward(x).square().mean()
    size = sum(saved.values())
    loss.backward()
    model.zero_grad()
    return size
