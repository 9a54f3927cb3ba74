"""Which quantized class stands for which torch class. One decorator adds a module to fakequant."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

from fakequant.errors import InvalidTypeError
from fakequant.nn.modules.quant_module import QuantInputMixin, QuantMixin

_Quantized = TypeVar("_Quantized", bound=QuantInputMixin)

_QUANTIZED: dict[type[nn.Module], type[QuantInputMixin]] = {}


def register(float_class: type[nn.Module]) -> Callable[[type[_Quantized]], type[_Quantized]]:
    """Class decorator: the quantized class that replaces float_class.

    Raises:
        InvalidTypeError: the class does not derive from both a mixin and float_class; a QuantMixin
            without default_quant_desc_weight; float_class has a quantized class already.
    """

    def add(quantized_class: type[_Quantized]) -> type[_Quantized]:
        name = quantized_class.__name__
        if not (issubclass(quantized_class, QuantInputMixin) and issubclass(quantized_class, float_class)):
            raise InvalidTypeError(
                f"{name}: expected a subclass of QuantInputMixin or QuantMixin, and of {float_class.__name__}"
            )
        if issubclass(quantized_class, QuantMixin) and not hasattr(quantized_class, "default_quant_desc_weight"):
            raise InvalidTypeError(f"{name}: expected a class attribute default_quant_desc_weight, got none")
        if float_class in _QUANTIZED:
            raise InvalidTypeError(f"{name}: {float_class.__name__} is quantized by {_QUANTIZED[float_class].__name__}")
        quantized_class.float_class = float_class
        _QUANTIZED[float_class] = quantized_class
        return quantized_class

    return add


def quantized_class_of(float_class: type[nn.Module]) -> type[QuantInputMixin] | None:
    """Return the quantized class of exactly this class; subclasses may have their own forward and do not count."""
    return _QUANTIZED.get(float_class)


def registered() -> Iterator[tuple[type[nn.Module], type[QuantInputMixin]]]:
    """Yield every (float class, quantized class), in order of registration."""
    yield from _QUANTIZED.items()


def why_unreachable(module: nn.Module) -> str:
    """Return why a module's class does not decide what its forward does, "" if it does."""
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""
