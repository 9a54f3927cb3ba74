"""Hiding what a module does from the owner of call sites that calls it: two hooks around its forward."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import _pop_mode, _push_mode

from fakequant.call_sites.running import Interception, running_interception
from fakequant.call_sites.sites import PerCall


def _enter(module: nn.Module, args: Any) -> None:
    """Let the ops that follow be nobody's."""
    _stay_last(module, _leave)
    _push_no_frame()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    running = running_interception()
    if running is not None:
        running.frames.pop()


def _push_no_frame() -> None:
    running = running_interception()
    if running is not None:
        running.frames.append(None)


class _Suspended(threading.local):
    """The interceptions that this thread has taken off torch's stack; None for one that could not be."""

    def __init__(self) -> None:
        self.stack: list[Interception | None] = []


_suspended = _Suspended()


def _stay_last(module: nn.Module, after: Callable[..., None]) -> None:
    """Let hooks that were added after ours run before it, still hidden."""
    hooks = module._forward_hooks
    if not torch.compiler.is_compiling() and hooks[next(reversed(hooks))] is not after:
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook is after))  # type: ignore[attr-defined]


def _suspend(module: nn.Module, args: Any) -> None:
    """Take the interception off torch's stack: without it, the ops inside run at full speed."""
    _stay_last(module, _resume)
    if torch.compiler.is_compiling():
        _push_no_frame()
        return
    depth = torch._C._len_torch_function_stack()
    top = torch._C._get_function_stack_at(depth - 1) if depth else None
    if isinstance(top, Interception):
        _suspended.stack.append(_pop_mode())
    else:
        _suspended.stack.append(None)
        _push_no_frame()


def _resume(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        _leave(module, args, output)
        return
    mode = _suspended.stack.pop()
    if mode is None:
        _leave(module, args, output)
    else:
        _push_mode(mode)


def hide(module: nn.Module) -> None:
    """Hide the calls inside a module from the owner that calls it."""
    if is_hidden(module):
        return
    counts_calls = any(isinstance(inside, PerCall) for inside in module.modules())
    before, after = (_enter, _leave) if counts_calls else (_suspend, _resume)
    module.register_forward_pre_hook(before, prepend=True)
    module.register_forward_hook(after, always_call=True)


_HIDING = frozenset({_enter, _leave, _suspend, _resume})


def is_hidden(module: nn.Module) -> bool:
    """Whether ``hide`` was called for a module."""
    return any(hook in _HIDING for hook in module._forward_pre_hooks.values())


def unhide(module: nn.Module) -> None:
    """Undo ``hide``."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in _HIDING]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
