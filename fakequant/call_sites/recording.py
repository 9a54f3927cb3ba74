"""The tensor graph of a model, from one example forward under a TorchFunctionMode.

Nothing is traced symbolically and nothing in the model is changed: control flow takes
the way that the example takes. The forward runs in eval mode without gradient.
"""

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from fakequant.call_sites.module_ops import op_of_module, weights_of
from fakequant.call_sites.ops import Op, Role, op_of, operands
from fakequant.call_sites.tensor_graph import Call, TensorGraph, Value
from fakequant.call_sites.untouched import untouched
from fakequant.nn import TensorQuantizer

_ARGUMENTS = ("dim", "mode", "value", "output_size", "is_causal", "scale", "dropout_p", "min_val", "min")
"""Plain arguments of ops that placement asks for, where they are passed by name or known by position."""

_POSITIONS = {
    "pad": {"mode": 2, "value": 3},
    "interpolate": {"mode": 3},
    "mean": {"dim": 1},
    "softmax": {"dim": 1},
    "scaled_dot_product_attention": {"dropout_p": 4, "is_causal": 5, "scale": 6},
    "constant_pad_nd": {"value": 2},
    "hardtanh": {"min_val": 1},
    "clamp": {"min": 1},
}


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    as_one_call: Collection[str] = (),
) -> TensorGraph:
    """Run a model once and return its tensor graph. The model is left as it was.

    Args:
        model: any module.
        args: of its forward.
        kwargs: of its forward.
        as_one_call: names of modules whose call is one op if their class is registered, also where
            otherwise the functions inside are recorded.
    """
    recorder = _Recorder(model)
    pytree.tree_map_only(Tensor, recorder.know_input, (args, dict(kwargs or {})))
    with untouched(model), recorder.following(model, as_one_call), recorder:
        outputs = model(*args, **dict(kwargs or {}))
    for tensor in _tensors(outputs):
        recorder.value_of(tensor).is_output = True
    return TensorGraph(tuple(recorder.calls), {name: frozenset(called) for name, called in recorder.callees.items()})


class _Frame:
    """One call of one module, from its first hook to its last."""

    def __init__(self, module: str, visit: int) -> None:
        self.module = module
        self.visit = visit
        self.is_opaque = True
        self.is_composite = False
        self.counts: Counter[str] = Counter()
        self.arguments: tuple[Value, ...] = ()


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.callees: defaultdict[str, set[str]] = defaultdict(set)
        self._values = 0
        # id -> (tensor, its value, its version counter when the value was made)
        self._current: dict[int, tuple[weakref.ref[Tensor], Value, int]] = {}
        self._frames: list[_Frame] = []
        self._visits: Counter[str] = Counter()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._make(tensor, None, parameter=name, is_constant=True)

    # Values.

    def know_input(self, tensor: Tensor) -> Tensor:
        """Take note of an input of the model."""
        self._make(tensor, None)
        return tensor

    def _make(self, tensor: Tensor, producer: Call | None, parameter: str = "", is_constant: bool = False) -> Value:
        value = Value(self._values, tuple(tensor.shape), tensor.dtype, producer, parameter, is_constant)
        self._values += 1
        self._current[id(tensor)] = (weakref.ref(tensor), value, _version(tensor))
        return value

    def value_of(self, tensor: Tensor) -> Value:
        """Return the value that a tensor holds now."""
        known = self._current.get(id(tensor))
        if known is not None and known[0]() is tensor and known[2] == _version(tensor):
            return known[1]
        # New, or written to through a view or an alias: nobody knows any more what it holds.
        return self._make(tensor, None)

    # Calls.

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = self._frames[-1] if self._frames else None
        if frame is None or frame.is_opaque:
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        read = [self.value_of(tensor) for tensor in given]  # before func, which may write into them
        op = op_of(func)
        call = self._call(frame, func, op, args, kwargs)
        outputs = func(*args, **kwargs)
        made = list(_tensors(outputs))
        if not made:
            return outputs
        self._add(call, read, made)
        return outputs

    def _call(
        self, frame: _Frame, func: Callable[..., Any], op: Op | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        kind = op.kind if op is not None else _name(func)
        occurrence = frame.counts[kind]
        frame.counts[kind] += 1
        found: list[Value | None] = []
        arguments: dict[str, object] = {}
        if op is not None:
            found = [
                self.value_of(operand) if isinstance(operand, Tensor) else None
                for operand in operands(op, args, kwargs)
            ]
            arguments = _plain(op, args, kwargs)
        else:
            found = [self.value_of(tensor) for tensor in _tensors((args, kwargs))]
        return Call(frame.module, kind, occurrence, frame.visit, op, False, tuple(found), arguments=arguments)

    def _add(self, call: Call, read: list[Value], made: list[Tensor]) -> None:
        for value in dict.fromkeys(read):
            positions = [index for index, operand in enumerate(call.operands) if operand is value]
            value.uses.extend((call, position) for position in positions or [-1])
        is_constant = all(value.is_constant for value in read)
        call.outputs = tuple(self._make(tensor, call, is_constant=is_constant) for tensor in made)
        self.calls.append(call)

    # Modules.

    @contextlib.contextmanager
    def following(self, model: nn.Module, as_one_call: Collection[str]) -> Iterator[None]:
        """Know at every moment whose forward runs; what hooks do is no part of it."""
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer):
                continue
            follow = _Following(self, name, op_of_module(module, name in as_one_call))
            # Outside and inside of all hooks that the module has.
            handles += [
                module.register_forward_pre_hook(follow.called, prepend=True),
                module.register_forward_pre_hook(follow.begin, with_kwargs=True),
                module.register_forward_hook(follow.end, prepend=True),
                module.register_forward_hook(follow.returned, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def called(self, name: str) -> None:
        """Take note of the call of a module."""
        if self._frames:
            self.callees[self._frames[-1].module].add(name)
        self._frames.append(_Frame(name, self._visits[name]))
        self._visits[name] += 1

    def begin(self, op: Op | None, args: tuple[Any, ...]) -> None:
        """Record what its forward does, or as one call if it stands for an op."""
        frame = self._frames[-1]
        frame.is_opaque = op is not None or any(outer.is_composite for outer in self._frames)
        frame.is_composite = op is not None
        if op is not None:
            frame.arguments = tuple(self.value_of(tensor) for tensor in _tensors(args))
            if op.role is Role.CELL and len(frame.arguments) == 1:  # without a state it starts from zeros
                frame.arguments += (self.value_of(torch.empty(0)),)

    def end(self, module: nn.Module, op: Op | None, output: Any) -> None:
        """Stop recording; record the call of a module that stands for an op."""
        frame = self._frames[-1]
        frame.is_opaque = True
        made = list(_tensors(output))
        if op is None or not made or any(outer.is_composite for outer in self._frames[:-1]):
            return
        weights = {name: self.value_of(getattr(module, name)) for name in weights_of(op)}
        read = [*frame.arguments, *weights.values()]
        arguments = iter(frame.arguments)
        found = [weights.get(name) or next(arguments, None) for name in op.operands]
        self._add(Call(frame.module, op.kind, 0, frame.visit, op, True, tuple(found)), read, made)

    def returned(self) -> None:
        """Go back to the caller."""
        self._frames.pop()


class _Following:
    """The hooks of one module."""

    def __init__(self, recorder: _Recorder, name: str, op: Op | None) -> None:
        self._recorder = recorder
        self._name = name
        self._op = op

    def called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._recorder.called(self._name)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._recorder.begin(self._op, (*args, *kwargs.values()))

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._recorder.end(module, self._op, output)

    def returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._recorder.returned()


def _name(func: Callable[..., Any]) -> str:
    name: str = resolve_name(func) or getattr(func, "__name__", type(func).__name__)
    return name.rsplit(".", 1)[-1]


def _plain(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, object]:
    """Return the plain arguments that placement asks for."""
    found = {name: kwargs[name] for name in _ARGUMENTS if name in kwargs}
    for name, position in _POSITIONS.get(op.kind, {}).items():
        if position < len(args):
            found[name] = args[position]
    return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors inside nested arguments or outputs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif hasattr(tree, "__dataclass_fields__"):
        yield from _tensors(list(vars(tree).values()))


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
