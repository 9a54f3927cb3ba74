"""The registry of search methods: what turns a histogram into amax, by name.

Adding a method is one function in one file::

    @search_method("percentile")
    def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor: ...
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from fakequant.calib.histogram import Histogram
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError

Search: TypeAlias = Callable[[Histogram, QuantDescriptor, float], Tensor]
"""(histogram, descriptor, percentile) -> amax, float32 [rows]."""


@dataclasses.dataclass(frozen=True)
class SearchMethod:
    """A registered search, and where it makes sense.

    Args:
        search: the function.
        on_floats: on a float grid, FP8 or FP4.
        on_weights: for weights; all are for activations.
    """

    search: Search
    on_floats: bool
    on_weights: bool = True


METHODS: dict[str, SearchMethod] = {}


def search_method(name: str, *, on_floats: bool = True, on_weights: bool = True) -> Callable[[Search], Search]:
    """Register the decorated function under a name; a name that is taken raises InvalidValueError."""

    def register(search: Search) -> Search:
        if name in METHODS:
            raise InvalidValueError(f"search method: expected a new name, got {name!r}, which is registered")
        METHODS[name] = SearchMethod(search, on_floats, on_weights)
        return search

    return register


def methods_for(descriptor: QuantDescriptor) -> dict[str, SearchMethod]:
    """Return the methods that work on the descriptor's grid, by name."""
    return {name: method for name, method in METHODS.items() if method.on_floats or not descriptor.is_float}


def checked_method(name: str, descriptor: QuantDescriptor) -> SearchMethod:
    """Return the method of that name, or raise InvalidValueError with the names that work."""
    known = methods_for(descriptor)
    if name not in known:
        grid = "float " if descriptor.is_float else ""
        raise InvalidValueError(f"{grid}calibration method: expected one of {sorted(known)}, got {name!r}")
    return known[name]


def check_method(argument: str, name: object, *, is_weight: bool) -> None:
    """Check the name of a method for weights, or for activations.

    Raises:
        InvalidTypeError: no str.
        InvalidValueError: an unknown name, or for weights that of a method for activations.

    >>> check_method("weight_method", "mse", is_weight=True)
    """
    known = sorted(known for known, method in METHODS.items() if method.on_weights or not is_weight)
    role = "weights" if is_weight else "activations"
    if not isinstance(name, str):
        raise InvalidTypeError(f"{argument}: expected one of {known} for {role}, got {name!r}")
    if name not in known:
        raise InvalidValueError(f"{argument}: expected one of {known} for {role}, got {name!r}")


@search_method("max")
def _search(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    """Return the exact largest |x|: nothing is ever clipped."""
    return histogram.amax
