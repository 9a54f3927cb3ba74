"""What a caller gave: types and bounds of arguments, refused before anything is changed."""

import math
import operator
from numbers import Integral, Real

from torch import nn
from torch.optim import Optimizer

from fakequant.errors import InvalidTypeError, InvalidValueError


def check_module(model: object) -> None:
    """Check that a model is one.

    Raises:
        InvalidTypeError: it is no nn.Module.

    >>> check_module(nn.Linear(2, 2))
    """
    if not isinstance(model, nn.Module):
        found = model.__name__ if isinstance(model, type) else type(model).__name__
        raise InvalidTypeError(f"model: expected an nn.Module, got {found}")


def check_optimizer(optimizer: object) -> None:
    """Check that an optimizer is one.

    Raises:
        InvalidTypeError: it is no torch.optim.Optimizer.

    >>> check_optimizer(Optimizer([nn.Parameter()], {}))
    """
    if not isinstance(optimizer, Optimizer):
        raise InvalidTypeError(f"optimizer: expected an optimizer of torch, got {type(optimizer).__name__}")


def check_number(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Check a finite number.

    Raises:
        InvalidTypeError: no number; a bool.
        InvalidValueError: NaN, infinite, or out of bounds.

    >>> check_number("momentum", 0.1, above=0, at_most=1)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    bounds = [
        (word, bound, is_inside)
        for word, bound, is_inside in (
            ("above", above, operator.gt),
            ("at least", at_least, operator.ge),
            ("at most", at_most, operator.le),
        )
        if bound is not None
    ]
    if not math.isfinite(number) or not all(is_inside(number, bound) for _, bound, is_inside in bounds):
        kind = "number" if math.isfinite(number) else "finite number"
        words = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds)
        raise InvalidValueError(f"{name}: expected a {kind} {words}, got {value!r}")


def check_count(name: str, value: object, *, at_least: int = 1, at_most: int | None = None) -> None:
    """Check a number of things.

    Raises:
        InvalidTypeError: no int; a bool.
        InvalidValueError: out of bounds.

    >>> check_count("steps", 10)
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name}: expected an int, got {value!r}")
    count = int(value)
    if count < at_least or (at_most is not None and count > at_most):
        expected = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise InvalidValueError(f"{name}: expected {expected}, got {value!r}")
