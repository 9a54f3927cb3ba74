"""Which quantized class stands for which torch class. One decorator adds a module to fakequant."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from torch import nn

from fakequant.errors import InvalidTypeError
from fakequant.nn.modules.quant_module import QuantInputMixin, QuantMixin

_Quantized = TypeVar("_Quantized", bound=QuantInputMixin)


class _Registered(NamedTuple):
    quantized_class: type[QuantInputMixin]
    by_default: bool
    seen_through: bool


_QUANTIZED: dict[type[nn.Module], _Registered] = {}


def register(
    float_class: type[nn.Module], *, by_default: bool = True, seen_through: bool = False
) -> Callable[[type[_Quantized]], type[_Quantized]]:
    """Class decorator: the quantized class that replaces float_class.

    Args:
        float_class: of torch, or of a user.
        by_default: initialize() patches it, and presets quantize it if it has a weight. Otherwise a rule or
            custom_quant_modules has to ask for it.
        seen_through: with an example, placement looks at the functions that its forward calls, unless a rule
            names its type. Otherwise a call of the module is one op.

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
        if (taken := quantized_class_of(float_class)) is not None:
            raise InvalidTypeError(f"{name}: {float_class.__name__} is quantized by {taken.__name__}")
        quantized_class.float_class = float_class
        _QUANTIZED[float_class] = _Registered(quantized_class, by_default, seen_through)
        return quantized_class

    return add


def register_on_request(float_class: type[nn.Module]) -> Callable[[type[_Quantized]], type[_Quantized]]:
    """Class decorator: ``register`` for a class that stays float, and is seen through, until a rule names its type."""
    return register(float_class, by_default=False, seen_through=True)


def quantized_class_of(float_class: type[nn.Module]) -> type[QuantInputMixin] | None:
    """Return the quantized class of exactly this class; subclasses may have their own forward and do not count."""
    found = _QUANTIZED.get(float_class)
    return None if found is None else found.quantized_class


def float_class_of(quantized_class: type[nn.Module]) -> type[nn.Module] | None:
    """Return what a quantized class, or a subclass of one, is the quantized form of; None for any other class."""
    return getattr(quantized_class, "float_class", None) if issubclass(quantized_class, QuantInputMixin) else None


def is_given(cls: type[nn.Module]) -> bool:
    """Whether ``quantize`` gives modules this class; a subclass of one is its author's, and stays as it is."""
    float_class = float_class_of(cls)
    return float_class is not None and quantized_class_of(float_class) is cls


def registered() -> Iterator[tuple[type[nn.Module], type[QuantInputMixin]]]:
    """Yield every (float class, quantized class), in order of registration."""
    for float_class, found in _QUANTIZED.items():
        yield float_class, found.quantized_class


def is_by_default(float_class: type[nn.Module]) -> bool:
    """Whether a registered class is quantized without a rule that asks for it."""
    return _QUANTIZED[float_class].by_default


def is_seen_through(float_class: type[nn.Module]) -> bool:
    """Whether placement looks at the functions inside a registered class, unless a rule names its type."""
    return _QUANTIZED[float_class].seen_through


def is_on_request(float_class: type[nn.Module]) -> bool:
    """Whether a class was registered by ``register_on_request``: only rules that name its type are about it."""
    found = _QUANTIZED.get(float_class)
    return found is not None and found.seen_through and not found.by_default


def weighted() -> dict[type[nn.Module], type[QuantMixin]]:
    """Return {float class: quantized class} of those with a weight."""
    return {float_class: cls for float_class, cls in registered() if issubclass(cls, QuantMixin)}


def weighted_by_default() -> dict[type[nn.Module], type[QuantMixin]]:
    """Return {float class: quantized class} of those with a weight that are quantized by default."""
    return {float_class: cls for float_class, cls in weighted().items() if is_by_default(float_class)}


def why_unreachable(module: nn.Module) -> str:
    """Return why a module's class does not decide what its forward does, "" if it does."""
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""
