"""The state of a running forward whose functional calls are quantized.

All of it lives in the Interception of that forward: nested, recursive, concurrent (DataParallel)
and interrupted forwards do not meet.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction

from fakequant.call_sites.containers import CALL_SITES
from fakequant.call_sites.ops import KIND_OF
from fakequant.errors import InvalidValueError

if TYPE_CHECKING:
    from fakequant.call_sites.sites import CallSites


class Frame:
    """One running forward of one owner."""

    def __init__(self, owner: nn.Module) -> None:
        self.sites: CallSites = owner._modules[CALL_SITES]  # type: ignore[assignment]
        self.counts: dict[str, int] = {}
        self.has_gradient = torch.is_grad_enabled()


class Interception(TorchFunctionMode):
    """The state of one running forward of an outermost owner, whose calls it counts op by op."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        outermost = Frame(owner)
        self.counts_calls = outermost.sites.counts_calls
        self.frames: list[Frame | None] = [outermost]
        self._slots: dict[str, int] = {}

    def next_call(self, slot: str) -> int:
        """Return how often a slot was called before, and count this call."""
        number = self._slots.get(slot, 0)
        self._slots[slot] = number + 1
        return number

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func, on quantized operands where the call is a site of the module that makes it."""
        kwargs = kwargs or {}
        frame = self.frames[-1]
        if frame is not None:
            kind = KIND_OF.get(func)
            if kind is not None and kind in frame.sites.kinds:
                occurrence = frame.counts.get(kind, 0)
                frame.counts[kind] = occurrence + 1
                site = frame.sites.site(kind, occurrence)
                if site is not None:
                    if frame.has_gradient and not torch.is_grad_enabled():
                        _check_runs_once(frame.sites.call_name(kind, occurrence))
                    return site(self, func, args, kwargs)
        return func(*args, **kwargs)


def running_interception() -> Interception | None:
    """Return the state of the forward that runs now, None if none is intercepted."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Interception):
            return mode
    return None


def _check_runs_once(call: str) -> None:
    """Check that a call without gradient, in a forward with it, is not that of a reentrant checkpoint.

    Its second run, in the backward pass, is outside of the owner's forward, and would be float without a word.
    """
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise InvalidValueError(
                f"{call}: expected gradient checkpointing of modules, got a checkpoint with use_reentrant=True "
                "of a function inside a forward, with a quantized call in it"
            )
