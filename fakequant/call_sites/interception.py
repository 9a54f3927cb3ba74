"""Quantizers on functional ops, without a change to any forward().

A module that owns call sites runs its forward under a TorchFunctionMode, which counts
its calls op by op, and quantizes the operands of those that are sites. Its class becomes
a subclass of its own class, made once per class; it pickles through the original one.
Modules called from an owner's forward carry two hooks that hide their own calls from
the owner's count.

All state of a running forward lives in its Interception: nested, recursive, concurrent
(DataParallel) and interrupted forwards do not meet. torch.compile traces through all of
it without a graph break.
"""

import copyreg
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from fakequant.call_sites.containers import CALL_SITES, hiding_base
from fakequant.call_sites.ops import IN_PLACE, KIND_OF, op_named, operands, with_operand
from fakequant.errors import InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.functional import attention

_NEW_OBJECT = getattr(copyreg, "__newobj__")  # noqa: B009 - its stub has no such name
"""What object.__reduce_ex__ rebuilds instances with."""


class CallSite(nn.Module):
    """The quantizers of one functional call, children under the names of its operands.

    Args:
        kind: of the op.
        weights: names of the operands that are weights.
    """

    def __init__(self, kind: str, weights: Iterable[str] = ()) -> None:
        super().__init__()
        self.kind = kind
        self.weights = tuple(weights)
        self.targets: dict[str, frozenset[str]] = {}
        """Operand -> the targets that want it quantized."""
        self.stand_by: frozenset[str] = frozenset()
        """The operands that the present target does not want quantized."""

    @property
    def weight_quantizers(self) -> list[TensorQuantizer]:
        """The quantizers of the weights."""
        return [self._modules[name] for name in self.weights]  # type: ignore[misc]

    def forward(
        self, running: "Interception", function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function on quantized operands."""
        if self.kind == "scaled_dot_product_attention":
            return self._attention(running, function, *args, **kwargs)
        op = op_named(self.kind)
        assert op is not None
        written: Any = args[0] if function in IN_PLACE else None
        for index, operand in enumerate(operands(op, args, kwargs)):
            quantizer = self._quantizer(op.operand_name(index), running)
            if quantizer is not None and isinstance(operand, Tensor):
                # What the quantizer keeps for its backward must not be written to.
                quantized = quantizer(operand.clone() if operand is written else operand)
                args, kwargs = with_operand(op, args, kwargs, index, quantized)
        if written is not None and args[0] is not written:
            return written.copy_(function(*args, **kwargs))
        return function(*args, **kwargs)

    def _attention(self, running: "Interception", function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        quantizers = {name: self._quantizer(name, running) for name in ("query", "key", "value", "softmax")}
        if not any(quantizer is not None and quantizer.is_active for quantizer in quantizers.values()):
            return function(*args, **kwargs)
        chosen: dict[str, Any] = {f"{name}_quantizer": quantizer or _identity for name, quantizer in quantizers.items()}
        return attention(*args, **{**kwargs, **chosen})

    @property
    def in_use(self) -> "list[TensorQuantizer | PerCall]":
        """The quantizers of the operands that the present target wants quantized."""
        return [q for operand, q in self._modules.items() if operand not in self.stand_by]  # type: ignore[misc]

    def _quantizer(self, operand: str, running: "Interception") -> TensorQuantizer | None:
        if operand in self.stand_by:
            return None
        quantizer = self._modules.get(operand)
        return quantizer.of_call(running) if isinstance(quantizer, PerCall) else quantizer  # type: ignore[return-value]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class CallSites(nn.Module):
    """The call sites of one module: children ``add_0``, ``cat_1``, ... by op and occurrence.

    Args:
        seen: how many calls of each kind the example forward made.
        counts_calls: whether a PerCall inside the module counts from the beginning of its forward.
    """

    def __init__(self, seen: dict[str, int], counts_calls: bool = False) -> None:
        super().__init__()
        self.seen = seen
        self.counts_calls = counts_calls
        self.kinds: frozenset[str] = frozenset()
        self.reported: set[str] = set()

    def add(self, name: str, site: CallSite) -> None:
        """Add a site."""
        self.add_module(name, site)
        self.kinds = self.kinds | {site.kind}

    def site(self, kind: str, occurrence: int, owner: nn.Module) -> CallSite | None:
        """Return the site of a call; report a call that the example did not make."""
        name = f"{kind}_{occurrence}"
        found = self._modules.get(name)
        if found is None and occurrence >= self.seen[kind] and not torch.compiler.is_compiling():
            self._report(name, owner)
        return found  # type: ignore[return-value]

    @property
    def is_idle(self) -> bool:
        """Whether a forward would be the same without it: no quantizer is active, nothing is counted."""
        if self.counts_calls:
            return False
        return not any(quantizer.is_active for site in self._modules.values() for quantizer in site.in_use)  # type: ignore[union-attr]

    def _report(self, name: str, owner: nn.Module) -> None:
        if name in self.reported:
            return
        self.reported.add(name)
        warnings.warn(
            f"{type(owner).__name__}: call {name} was not made in the example forward and stays float. "
            "Quantize with an example that takes this way, if it matters",
            stacklevel=2,
        )


class PerCall(nn.Module):
    """A quantizer for each call of one slot within one forward of the model, children ``0``, ``1``, ...

    Args:
        slot: full name of the operand, which no other PerCall of the model has.
        quantizers: one a call; the last also serves calls beyond.
    """

    def __init__(self, slot: str, quantizers: list[TensorQuantizer]) -> None:
        super().__init__()
        self.slot = slot
        for index, quantizer in enumerate(quantizers):
            self.add_module(str(index), quantizer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Quantize with the quantizer of this call."""
        quantized: Tensor = self.of_call(_running())(inputs)
        return quantized

    @property
    def is_active(self) -> bool:
        """Whether a call may quantize or collect."""
        return any(quantizer.is_active for quantizer in self._modules.values())  # type: ignore[union-attr]

    def of_call(self, running: "Interception | None") -> TensorQuantizer:
        """Return the quantizer of this call, and count the call.

        Raises:
            InvalidValueError: a second forward in the backward pass, which does not tell which call it repeats.
        """
        if (running is None or not running.counts_calls) and _in_backward():
            raise InvalidValueError(
                f"{self.slot}: expected gradient checkpointing of the whole model or of modules that it calls once, "
                f"got a checkpoint of a module with a quantizer for each of its {len(self._modules)} calls"
            )
        number = 0 if running is None else running.next_call(self.slot)
        return self._modules[str(min(number, len(self._modules) - 1))]  # type: ignore[return-value]


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Frame:
    """One running forward of one owner."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.sites: CallSites = owner._modules[CALL_SITES]  # type: ignore[assignment]
        self.counts: dict[str, int] = {}


class Interception(TorchFunctionMode):
    """The state of one running forward of an outermost owner."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        outermost = _Frame(owner)
        self.counts_calls = outermost.sites.counts_calls
        self.frames: list[_Frame | None] = [outermost]
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
                site = frame.sites.site(kind, occurrence, frame.owner)
                if site is not None:
                    return site(self, func, args, kwargs)
        return func(*args, **kwargs)


def _running() -> Interception | None:
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Interception):
            return mode
    return None


class Intercepted(nn.Module):
    """Mixin of the classes that owners of call sites get."""

    intercepted_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its call sites quantized."""
        if CALL_SITES not in self._modules:  # a slice of a container has its class and no sites
            return super().forward(*args, **kwargs)
        running = _running()
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
        running.frames.append(_Frame(self))
        try:
            return super().forward(*args, **kwargs)
        finally:
            running.frames.pop()

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


def _enter(module: nn.Module, args: Any) -> None:
    """Let the ops that follow be nobody's."""
    _stay_last(module, _leave)
    _push_no_frame()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    running = _running()
    if running is not None:
        running.frames.pop()


def _push_no_frame() -> None:
    running = _running()
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


def is_owner(module: nn.Module) -> bool:
    """Whether a module has call sites."""
    return isinstance(module, Intercepted)


def intercept(module: nn.Module, sites: CallSites) -> None:
    """Make a module the owner of call sites, in place."""
    module.add_module(CALL_SITES, sites)
    module.__class__ = _intercepted(type(module))


def hide(module: nn.Module) -> None:
    """Hide the calls inside a module from the owner that calls it."""
    if any(hook in _HIDING for hook in module._forward_pre_hooks.values()):
        return
    counts_calls = any(isinstance(inside, PerCall) for inside in module.modules())
    before, after = (_enter, _leave) if counts_calls else (_suspend, _resume)
    module.register_forward_pre_hook(before, prepend=True)
    module.register_forward_hook(after, always_call=True)


_HIDING = frozenset({_enter, _leave, _suspend, _resume})


def release(module: nn.Module) -> None:
    """Undo ``intercept`` and ``hide``."""
    if isinstance(module, Intercepted):
        module._modules.pop(CALL_SITES, None)
        module.__class__ = module.intercepted_class  # type: ignore[assignment]
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in _HIDING]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def call_sites(model: nn.Module) -> Iterator[tuple[str, CallSite]]:
    """Yield (full name, site) for every call site: ``layer1.0.add_0``."""
    for name, module in model.named_modules():
        if isinstance(module, Intercepted):
            for site_name, site in module._modules[CALL_SITES].named_children():  # type: ignore[union-attr]
                yield f"{name}.{site_name}".lstrip("."), site  # type: ignore[misc]
