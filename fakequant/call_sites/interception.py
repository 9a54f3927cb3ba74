"""Quantizers on functional ops, without a change to any forward().

A module that owns call sites runs its forward under a TorchFunctionMode, which counts
its calls op by op, and quantizes the operands of those that are sites. Its class becomes
a subclass of its own class, made once per class; it pickles through the original one.
Modules called from an owner's forward carry two hooks that hide their own calls from
the owner's count.

The state of a running forward is in its Interception, see ``running``. torch.compile traces
through all of it without a graph break.
"""

import copyreg
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import _pop_mode, _push_mode

from fakequant.call_sites.containers import CALL_SITES, hiding_base
from fakequant.call_sites.hiding import hide, is_hidden, unhide
from fakequant.call_sites.running import Frame, Interception, running_interception
from fakequant.call_sites.sites import CallSite, CallSites

_NEW_OBJECT = getattr(copyreg, "__newobj__")  # noqa: B009 - its stub has no such name
"""What object.__reduce_ex__ rebuilds instances with."""


class Intercepted(nn.Module):
    """Mixin of the classes that owners of call sites get."""

    intercepted_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its call sites quantized."""
        if CALL_SITES not in self._modules:  # a slice of a container has its class and no sites
            return super().forward(*args, **kwargs)
        running = running_interception()
        if running is None:
            if self._modules[CALL_SITES].is_idle:  # type: ignore[union-attr]
                # Under a mode, torch would not take its fused kernels.
                return super().forward(*args, **kwargs)
            running = Interception(self)
            before = torch._C._len_torch_function_stack()
            _push_mode(running)
            try:
                return super().forward(*args, **kwargs)
            finally:
                # Not there if a KeyboardInterrupt skipped the hook that puts it back.
                if torch._C._len_torch_function_stack() > before:
                    _pop_mode()
        running.frames.append(Frame(self))
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.frames.pop()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; one that takes the place of a hidden one, as of SyncBatchNorm's conversion, is hidden too."""
        replaced = self._modules.get(name)
        super().add_module(name, module)
        if module is not None and replaced is not None and is_hidden(replaced):
            hide(module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through the original class, which has a name to be found by."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is _NEW_OBJECT and reduced[1][0] is type(self):
            return (_new, (self.intercepted_class, *reduced[1][1:]), *reduced[2:])
        return reduced


def _new(float_class: type[nn.Module], *args: Any) -> nn.Module:
    cls = _intercepted(float_class)
    return cls.__new__(cls, *args)


_INTERCEPTED: dict[type[nn.Module], type[Intercepted]] = {}


def _intercepted(cls: type[nn.Module]) -> type[Intercepted]:
    """Return the subclass for owners of this class."""
    if cls not in _INTERCEPTED:

        @functools.wraps(cls.forward)
        def forward(self: Intercepted, *args: Any, **kwargs: Any) -> Any:
            return Intercepted.forward(self, *args, **kwargs)

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        made: Any = type(cls)  # the metaclass, which is not always type
        bases = (Intercepted, *hiding_base(cls), cls)
        _INTERCEPTED[cls] = made(cls.__name__, bases, {**names, "intercepted_class": cls, "forward": forward})
    return _INTERCEPTED[cls]


def is_owner(module: nn.Module) -> bool:
    """Whether a module has call sites."""
    return isinstance(module, Intercepted)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, of an owner the one that it had before."""
    return module.intercepted_class if isinstance(module, Intercepted) else type(module)


def intercept(module: nn.Module, sites: CallSites) -> None:
    """Make a module the owner of call sites, in place."""
    module.add_module(CALL_SITES, sites)
    module.__class__ = _intercepted(type(module))


def release(module: nn.Module) -> None:
    """Undo ``intercept`` and ``hide``."""
    if isinstance(module, Intercepted):
        module._modules.pop(CALL_SITES, None)
        module.__class__ = module.intercepted_class  # type: ignore[assignment]
    unhide(module)


def call_sites(model: nn.Module) -> Iterator[tuple[str, CallSite]]:
    """Yield (full name, site) for every call site: ``layer1.0.add_0``."""
    for name, module in model.named_modules():
        if isinstance(module, Intercepted):
            for site_name, site in module._modules[CALL_SITES].named_children():  # type: ignore[union-attr]
                yield f"{name}.{site_name}".lstrip("."), site  # type: ignore[misc]
