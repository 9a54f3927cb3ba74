"""Modules with a quantized class as ops: what placement sees of one when its forward is recorded as a single call."""

from collections.abc import Collection
from typing import Any

from torch import nn

from fakequant.call_sites.ops import Op, Role, op_named
from fakequant.nn import QuantMixin, quantized_class_of
from fakequant.nn.registry import float_class_of, is_seen_through


def op_of_module(module: nn.Module, is_asked_for: bool) -> Op | None:
    """Return the op that a module with a quantized class stands for; its forward is one call."""
    float_class = float_class_of(type(module)) or type(module)
    quantized = quantized_class_of(float_class)
    if quantized is None:
        return None
    if float_class is type(module) and is_seen_through(float_class) and not is_asked_for:
        return None
    if issubclass(float_class, nn.RNNBase | nn.RNNCellBase):
        return _recurrent(float_class, module)
    for base in float_class.__mro__:
        if base.__module__.startswith("torch.") and (known := op_named(_snake_case(base.__name__))) is not None:
            return known
    if not issubclass(quantized, QuantMixin):
        return Op(float_class.__name__, Role.OTHER, quantized.input_names)
    inputs, weights = quantized.input_names, _weight_names(quantized, module)
    if (inputs, weights) == (("input",), ("weight",)):
        return Op(float_class.__name__, Role.WEIGHTED, ("input", "weight"))
    return Op(float_class.__name__, Role.CUSTOM, (*inputs, *weights), quantized=inputs, weights=dict.fromkeys(weights))


def _weight_names(quantized: type[QuantMixin], module: nn.Module) -> tuple[str, ...]:
    """Return what ``weight_names`` is once a module, which may still be float, is of the quantized class."""
    names: Any = quantized.weight_names
    found: tuple[str, ...] = names.__get__(module, quantized) if isinstance(names, property) else names
    return found


def weights_of(op: Op) -> Collection[str]:
    """Return the names of the operands of a module that are its parameters."""
    return ("weight",) if op.role is Role.WEIGHTED else op.weights


def _recurrent(float_class: type[nn.Module], module: nn.Module) -> Op:
    """Return the op that a recurrent layer or cell stands for: its operands are its inputs, then all of its weights."""
    quantized = quantized_class_of(float_class)
    assert quantized is not None
    weights = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]
    role = Role.CELL if issubclass(float_class, nn.RNNCellBase) else Role.RECURRENT
    return Op(float_class.__name__, role, (*quantized.input_names, *weights), weights=dict.fromkeys(weights, 0))


def _snake_case(class_name: str) -> str:
    """Return AdaptiveAvgPool2d as adaptive_avg_pool2d."""
    letters = [f"_{letter.lower()}" if letter.isupper() else letter for letter in class_name]
    return "".join(letters).lstrip("_")
