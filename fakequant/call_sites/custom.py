"""Custom ops: which of their operands are quantized, and how they are exported."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from fakequant.call_sites.ops import Op, Role, add_op
from fakequant.errors import InvalidTypeError, InvalidValueError

Translation: TypeAlias = Callable[..., Any]
"""As torch.onnx's custom_translation_table takes it: a function of onnxscript values."""

TRANSLATIONS: dict[Any, Translation] = {}
"""Overload of a custom op -> how it is exported."""


def register_op(
    op: Any,
    *,
    inputs: Sequence[str],
    weights: Mapping[str, int | None] | None = None,
    onnx: Translation | None = None,
) -> None:
    """Quantize the calls of a custom op in models that are quantized with an example.

    Args:
        op: ``torch.ops.mylib.scale_rows``, or what ``torch.library.custom_op`` returned.
        inputs: names of the arguments that are quantized per tensor.
        weights: {name of an argument that is a weight: the axis of its channels, None for per tensor}.
        onnx: returns the op as onnxscript values, as in torch.onnx's ``custom_translation_table``.

    Raises:
        InvalidTypeError: op is no operator of torch.
        InvalidValueError: a name that is no argument of it, or a kind that exists: call sites go by the op's own name.

    ::

        @torch.library.custom_op("mylib::scale_rows", mutates_args=())
        def scale_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x * w[:, None]

        op = onnxscript.opset18
        fakequant.register_op(
            scale_rows, inputs=("x",), weights={"w": None}, onnx=lambda x, w: op.Mul(x, op.Unsqueeze(w, [1]))
        )
    """
    packet = _packet(op)
    overloads = [getattr(packet, name) for name in packet.overloads()]
    names = tuple(argument.name for argument in overloads[0]._schema.arguments)
    channels = dict(weights or {})
    if unknown := [name for name in (*inputs, *channels) if name not in names]:
        raise InvalidValueError(f"{packet}: expected arguments among {', '.join(names)}, got {', '.join(unknown)}")
    kind = packet._qualified_op_name.rpartition("::")[2]
    add_op(Op(kind, Role.CUSTOM, names, quantized=tuple(inputs), weights=channels), (op, packet, *overloads))
    if onnx is not None:
        TRANSLATIONS.update(dict.fromkeys(overloads, onnx))


def _packet(op: Any) -> Any:
    if isinstance(op, torch.library.CustomOpDef):
        op = op._opoverload
    if isinstance(op, torch._ops.OpOverload):
        op = op.overloadpacket
    if not isinstance(op, torch._ops.OpOverloadPacket):
        raise InvalidTypeError(f"op: expected an operator such as torch.ops.mylib.name, got {op!r}")
    return op
