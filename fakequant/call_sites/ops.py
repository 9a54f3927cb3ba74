"""The functional ops that quantization is about: one table from torch's functions to what placement knows of them.

An op goes by one name whatever way it is written: ``torch.add``, ``x.add_(y)``, ``x + y``
and ``operator.add`` are all "add".
"""

import dataclasses
import enum
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fakequant.errors import InvalidValueError


class Role(enum.Enum):
    """What an op means for placement."""

    WEIGHTED = "weighted"
    """Multiplies its first operand by a weight, the second: convolution, linear."""
    PRODUCT = "product"
    """Multiplies two tensors of any origin: matmul, bmm, einsum."""
    ATTENTION = "attention"
    """The fused q k v product."""
    ADD = "add"
    MULTIPLY = "multiply"
    MOVE = "move"
    """Only moves, drops or repeats elements: its operands and outputs can share one range."""
    AVERAGE = "average"
    """Averages over space: average pooling, mean."""
    POINTWISE = "pointwise"
    """A function of single elements, or an affine map of channels, that engines fuse behind a convolution."""
    IDENTITY = "identity"
    """Returns its operand in eval mode: dropout."""
    SOFTMAX = "softmax"
    CUSTOM = "custom"
    """Registered by a user, who says what is quantized."""
    RECURRENT = "recurrent"
    """LSTM, GRU and RNN over a whole sequence, which runtimes compute in float inside."""
    CELL = "cell"
    """One step of them: two products with a weight each, of the input and of the hidden state."""
    OTHER = "other"


RECURRENT_ROLES = frozenset({Role.RECURRENT, Role.CELL})


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    Args:
        kind: its name, in call-site names and in rules.
        role: what placement makes of it.
        operands: names of its tensor arguments, in order; ``("tensors",)`` is one list of tensors.
        weight_axis: the output channels of the weight, for WEIGHTED.
        quantized: names of the operands that are quantized, for CUSTOM.
        weights: {name of an operand that is a weight: its output channels}, for CUSTOM, RECURRENT and CELL.
    """

    kind: str
    role: Role
    operands: tuple[str, ...] = ("input",)
    weight_axis: int = 0
    quantized: tuple[str, ...] = ()
    weights: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def takes_list(self) -> bool:
        """Whether the operands are the items of one list."""
        return self.operands == ("tensors",)

    def operand_name(self, index: int) -> str:
        """Return the name of an operand: ``"other"``, or ``"tensors_2"`` in a list."""
        if self.takes_list:
            return f"tensors_{index}"
        return self.operands[index]


_CONV = tuple(f"conv{d}d" for d in (1, 2, 3))
_CONV_TRANSPOSE = tuple(f"conv_transpose{d}d" for d in (1, 2, 3))
_MAX_POOL = tuple(f"{prefix}max_pool{d}d" for prefix in ("", "adaptive_") for d in (1, 2, 3))
_AVG_POOL = tuple(f"{prefix}avg_pool{d}d" for prefix in ("", "adaptive_") for d in (1, 2, 3))

_KINDS: dict[str, tuple[str, ...]] = {
    "add": ("add",),
    "sub": ("sub", "subtract"),
    "mul": ("mul", "multiply"),
    "div": ("div", "divide", "true_divide", "truediv"),
    "cat": ("cat", "concat", "concatenate"),
    "pad": ("pad", "constant_pad_nd"),
    "interpolate": ("interpolate", "upsample", "upsample_nearest"),
    "rnn": ("rnn_tanh", "rnn_relu"),
    "rsub": ("rsub",),
    "rdiv": ("rdiv", "rtruediv"),
}
"""Kinds that go by several names; every other kind is written one way."""

_MOVES = (
    *("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze"),
    *("transpose", "t", "T", "mT", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "roll", "flip", "rot90"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "index_select", "getitem"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "tile", "clone", "detach", "unfold", "gather", "diagonal"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "take_along_dim"),
)
_POINTWISE = (
    *(
        "batch_norm",
        "relu",
        "relu6",
        "hardtanh",
        "clamp",
        "clip",
        "silu",
        "hardswish",
        "gelu",
        "sigmoid",
        "hardsigmoid",
    ),
    *("leaky_relu", "elu", "selu", "celu", "mish", "softplus", "tanh", "prelu", "rrelu", "logsigmoid", "hardshrink"),
    "softsign",
)


def _table() -> Iterator[Op]:
    for kind in _CONV:
        yield Op(kind, Role.WEIGHTED, ("input", "weight"))
    for kind in _CONV_TRANSPOSE:
        yield Op(kind, Role.WEIGHTED, ("input", "weight"), weight_axis=1)
    yield Op("linear", Role.WEIGHTED, ("input", "weight"))
    yield Op("matmul", Role.PRODUCT, ("input", "other"))
    yield Op("bmm", Role.PRODUCT, ("input", "mat2"))
    yield Op("mm", Role.PRODUCT, ("input", "mat2"))
    yield Op("baddbmm", Role.OTHER, ("input", "batch1", "batch2"))
    yield Op("addmm", Role.OTHER, ("input", "mat1", "mat2"))
    yield Op("einsum", Role.OTHER, ("tensors",))
    yield Op("scaled_dot_product_attention", Role.ATTENTION, ("query", "key", "value", "attn_mask"))
    for kind in ("add", "sub"):
        yield Op(kind, Role.ADD, ("input", "other"))
    for kind in ("mul", "div"):
        yield Op(kind, Role.MULTIPLY, ("input", "other"))
    for kind in ("rsub", "rdiv"):
        yield Op(kind, Role.OTHER, ("input", "other"))
    for kind in ("cat", "stack"):
        yield Op(kind, Role.MOVE, ("tensors",))
    for kind in (*_MAX_POOL, "pad", "interpolate", *_MOVES):
        yield Op(kind, Role.MOVE)
    for kind in (*_AVG_POOL, "mean"):
        yield Op(kind, Role.AVERAGE)
    for kind in _POINTWISE:
        yield Op(kind, Role.POINTWISE)
    for kind in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"):
        yield Op(kind, Role.IDENTITY)
    yield Op("softmax", Role.SOFTMAX)
    for kind in ("lstm", "gru", "rnn"):
        yield Op(kind, Role.RECURRENT)
    for kind in ("layer_norm", "group_norm", "instance_norm", "rms_norm", "multi_head_attention_forward"):
        yield Op(kind, Role.OTHER)


_WHERE = (torch, Tensor, F, torch._C._nn)
_PYTHON_OPERATORS = frozenset({"add", "sub", "mul", "truediv", "matmul", "getitem"})


def _functions(kind: str) -> Iterator[Any]:
    """Yield every function of torch and of Python that is this op."""
    for name in _KINDS.get(kind, (kind,)):
        spellings = [name, f"{name}_", f"__{name}__", f"__i{name}__"]
        if kind not in ("sub", "div"):  # 1 - x is another op than x - 1
            spellings.append(f"__r{name}__")
        for spelling in spellings:
            for place in _WHERE:
                function = getattr(place, spelling, None)
                if callable(function):
                    yield function
        if name in _PYTHON_OPERATORS:
            yield getattr(operator, name)
            if name != "getitem":
                yield getattr(operator, f"i{name}")  # torch.export(strict=True) hands these to a mode


_OPS: dict[str, Op] = {op.kind: op for op in _table()}
_OP_OF: dict[Any, Op] = {function: op for op in _OPS.values() for function in _functions(op.kind)}
for _attribute in ("T", "mT"):
    _OP_OF[getattr(Tensor, _attribute).__get__] = _OPS[_attribute]

_NO_SITES = frozenset({*_MOVES, "pad", "rsub", "rdiv"})
"""Ops that torch.compile does not show to a mode, or shows under another function than it calls."""

KIND_OF: dict[Any, str] = {
    function: op.kind for function, op in _OP_OF.items() if op.kind not in _NO_SITES and op.role is not Role.IDENTITY
}
"""The ops that can be call sites: function -> kind. Plain strings, because torch.compile traces look-ups in it."""

IN_PLACE: frozenset[Any] = frozenset(
    function
    for kind in ("add", "sub", "mul", "div")
    for name in (kind, *_KINDS[kind])
    for place, spelling in (
        (Tensor, f"{name}_"),
        (Tensor, f"__i{name}__"),
        (operator, f"i{name}"),
    )
    if callable(function := getattr(place, spelling, None))
)
"""Those of them that write into their first operand."""


def op_of(function: Any) -> Op | None:
    """Return the op that a function of torch is, None for one that quantization is not about.

    >>> op_of(torch.Tensor.__iadd__).kind, op_of(torch.cat).operands, op_of(torch.argsort)
    ('add', ('tensors',), None)
    """
    try:
        return _OP_OF.get(function)
    except TypeError:  # unhashable
        return None


def add_op(op: Op, functions: Iterable[Any]) -> None:
    """Make an op of functions that torch does not have.

    Raises:
        InvalidValueError: there is an op of that kind.
    """
    if op.kind in _OPS:
        raise InvalidValueError(f"kind: expected a new name, got {op.kind!r}, which is an op already")
    _OPS[op.kind] = op
    for function in functions:
        _OP_OF[function] = op
        KIND_OF[function] = op.kind


def op_named(kind: str) -> Op | None:
    """Return the op of a kind."""
    return _OPS.get(kind)


def operands(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return what a call passes for each operand, None where nothing.

    >>> operands(op_of(torch.cat), ([1, 2],), {}), operands(op_of(torch.add), (1,), {"other": 2})
    ([1, 2], [1, 2])
    """
    if op.kind == "einsum":
        given = args[1:]
        return list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)
    found = [args[index] if index < len(args) else kwargs.get(name) for index, name in enumerate(op.operands)]
    if op.takes_list:
        return list(found[0]) if isinstance(found[0], list | tuple) else []
    return found


def with_operand(
    op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with one operand replaced.

    >>> with_operand(op_of(torch.add), (1, 2), {}, 1, 5)
    ((1, 5), {})
    """
    if op.takes_list:
        tensors = operands(op, args, kwargs)
        tensors[index] = value
        if op.kind == "einsum":
            return (args[0], *tensors), kwargs
        return ((tensors, *args[1:]), kwargs) if args else (args, {**kwargs, "tensors": tensors})
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    return args, {**kwargs, op.operands[index]: value}
