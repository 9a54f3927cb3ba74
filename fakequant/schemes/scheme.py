"""Scheme: a quantizer whose scale comes from the tensor itself. The base class, and the registry.

Adding a scheme is one class in one file::

    @register_scheme("twn")
    class TernaryWeights(Scheme): ...
"""

import abc
from collections.abc import Callable, Collection
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fakequant.arithmetic import Codes, dequantize
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError


class Scheme(abc.ABC):
    """How a paper quantizes a tensor. It has no state."""

    weights_only: ClassVar[bool]
    """Whether the formula is for weights, not for activations."""

    num_bits: ClassVar[Collection[int]]
    """The numbers of bits that it has a formula for."""

    takes_axis: ClassVar[bool]
    """Whether each index along the descriptor's axis may have its own scale."""

    name: ClassVar[str]
    """What a descriptor calls it; set by ``register_scheme``."""

    def check(self, descriptor: QuantDescriptor) -> None:
        """Check the fields that only this scheme knows about.

        Raises:
            InvalidValueError: num_bits, axis or block_size that the scheme has no formula for.
        """
        if descriptor.num_bits not in self.num_bits:
            expected = f"one of {list(self.num_bits)}"
            raise InvalidValueError(f"scheme {self.name!r}: expected num_bits {expected}, got {descriptor.num_bits}")
        if descriptor.axis is not None and not self.takes_axis:
            raise InvalidValueError(f"scheme {self.name!r}: expected axis None, got {descriptor.axis}")
        if descriptor.block_size is not None:
            raise InvalidValueError(f"scheme {self.name!r}: expected block_size None, got {descriptor.block_size}")

    @abc.abstractmethod
    def bounds(self, descriptor: QuantDescriptor) -> tuple[int, int]:
        """Return the lowest and highest code."""

    @abc.abstractmethod
    def codes(self, x: Tensor, descriptor: QuantDescriptor) -> Codes:
        """Return x as integers and a positive scale that broadcasts against x, without gradient."""

    @abc.abstractmethod
    def fake_quantize(self, x: Tensor, descriptor: QuantDescriptor) -> Tensor:
        """Return ``codes * scale`` in x's dtype, with the paper's gradient to x."""


def values_in(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Return what codes with zero point 0 stand for."""
    return dequantize(codes.codes, codes.scale).to(dtype)


SCHEMES: dict[str, Scheme] = {}

_Registered = TypeVar("_Registered", bound=type[Scheme])


def register_scheme(name: str) -> Callable[[_Registered], _Registered]:
    """Register the decorated class as a ``scheme``; a name that is taken raises InvalidValueError."""

    def register(scheme: _Registered) -> _Registered:
        if name in SCHEMES:
            raise InvalidValueError(f"scheme: expected a new name, got {name!r}, which is registered")
        scheme.name = name
        SCHEMES[name] = scheme()
        return scheme

    return register


def scheme_for(descriptor: QuantDescriptor) -> Scheme:
    """Return the scheme that ``descriptor.scheme`` names, after its own check of the descriptor.

    Raises:
        InvalidValueError: no scheme has that name, with those that exist; a field that it has no formula for.

    >>> scheme_for(QuantDescriptor(2, scheme="twn")).weights_only
    True
    """
    if descriptor.scheme not in SCHEMES:
        raise InvalidValueError(f"scheme: expected one of {sorted(SCHEMES)}, got {descriptor.scheme!r}")
    scheme = SCHEMES[descriptor.scheme]
    scheme.check(descriptor)
    return scheme
