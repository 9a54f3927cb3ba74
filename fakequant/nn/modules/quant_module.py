"""The two mixins that make a quantized module of a float one.

A quantized class derives from a mixin and from torch's own class and adds quantizers;
the arithmetic stays torch's. That is why a float module becomes quantized in place by
assigning its ``__class__`` and calling ``init_quantizer``, and float again by the reverse.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.descriptor_fields import UNIFORM
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.fake_quantize import recompute_quantized
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.schemes import scheme_for


def quantizer_name(tensor: str) -> str:
    """Return the name of the child that quantizes a tensor of a module: an input, or a parameter.

    >>> quantizer_name("input"), quantizer_name("weight_ih_l0")
    ('_input_quantizer', '_weight_ih_l0_quantizer')
    """
    return f"_{tensor}_quantizer"


def checked_grid(name: str, descriptor: object) -> QuantDescriptor:
    """Return the descriptor if a module can use it.

    Raises:
        InvalidTypeError: no QuantDescriptor.
        InvalidValueError: one that gives codes.
    """
    if not isinstance(descriptor, QuantDescriptor):
        raise InvalidTypeError(f"{name}: expected a QuantDescriptor, got {descriptor!r}")
    if not descriptor.fake_quant:
        raise InvalidValueError(f"{name}: expected fake_quant=True inside a module, got {descriptor}")
    return descriptor


def checked_input_grid(name: str, descriptor: object) -> QuantDescriptor:
    """Return the descriptor if a module can use it for an input.

    Raises:
        InvalidTypeError: no QuantDescriptor.
        InvalidValueError: one that gives codes, or one of a scheme for weights.
    """
    grid = checked_grid(name, descriptor)
    if grid.scheme != UNIFORM and scheme_for(grid).weights_only:
        raise InvalidValueError(f"{name}: expected a grid for inputs, got scheme {grid.scheme!r}, which is for weights")
    return grid


class QuantInputMixin(nn.Module):
    """A module with quantizers on its inputs.

    Constructor arguments are those of the float class, and keyword-only ``quant_desc_input``.
    """

    float_class: ClassVar[type[nn.Module]]
    """The torch class that this one replaces; set by ``register``."""

    default_quant_desc_input: ClassVar[QuantDescriptor] = QUANT_DESC_8BIT_PER_TENSOR

    input_names: ClassVar[tuple[str, ...]] = ("input",)
    """The inputs that are quantized, each by the child ``quantizer_name`` says."""

    _input_quantizer: TensorQuantizer

    def __init__(self, *args: Any, quant_desc_input: QuantDescriptor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module such that it keeps no quantized activation for backward; see ``recompute_quantized``."""
        with recompute_quantized():
            return super().__call__(*args, **kwargs)

    @classmethod
    def set_default_quant_desc_input(cls, descriptor: QuantDescriptor) -> None:
        """Set the input grid of instances made from now on, of this class only."""
        cls.default_quant_desc_input = checked_input_grid("quant_desc_input", descriptor)

    def init_quantizer(self, quant_desc_input: QuantDescriptor | None = None) -> None:
        """Add the quantizers; None takes the class default."""
        descriptor = checked_input_grid("quant_desc_input", quant_desc_input or self.default_quant_desc_input)
        for name in self.input_names:
            self.add_module(quantizer_name(name), TensorQuantizer(descriptor))

    def quantized_names(self) -> tuple[str, ...]:
        """Return the tensors that may have a quantizer, each by the child ``quantizer_name`` says."""
        return self.input_names

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer

    def input_quantizers(self) -> Iterator[TensorQuantizer]:
        """Yield the quantizers of all inputs."""
        for name in self.input_names:
            yield self._modules[quantizer_name(name)]  # type: ignore[misc]


class QuantizedInputForward(QuantInputMixin):
    """The forward of a module without weight: its own, on the quantized input."""

    def forward(self, input: Tensor) -> Any:
        """Return what the float class returns for the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantMixin(QuantInputMixin):
    """A module with quantizers on its inputs and its weights, by default one, ``weight``.

    Constructor arguments are those of the float class, and keyword-only
    ``quant_desc_input`` and ``quant_desc_weight``.
    """

    default_quant_desc_weight: ClassVar[QuantDescriptor]

    weight: Tensor
    _weight_quantizer: TensorQuantizer

    def __init__(
        self,
        *args: Any,
        quant_desc_input: QuantDescriptor | None = None,
        quant_desc_weight: QuantDescriptor | None = None,
        **kwargs: Any,
    ) -> None:
        super(QuantInputMixin, self).__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input, quant_desc_weight)

    @classmethod
    def set_default_quant_desc_weight(cls, descriptor: QuantDescriptor) -> None:
        """Set the weight grid of instances made from now on, of this class only."""
        cls.default_quant_desc_weight = checked_grid("quant_desc_weight", descriptor)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The parameters that are quantized, each by the child ``quantizer_name`` says."""
        return ("weight",)

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        """Add the quantizers; None takes the class default.

        Raises:
            InvalidValueError: the class names a weight that the module has not.
        """
        if absent := [name for name in self.weight_names if not isinstance(getattr(self, name, None), Tensor)]:
            raise InvalidValueError(f"{type(self).__name__}.weight_names: expected parameters of it, got {absent}")
        super().init_quantizer(quant_desc_input)
        descriptor = checked_grid("quant_desc_weight", quant_desc_weight or self.default_quant_desc_weight)
        for name in self.weight_names:
            quantizer = TensorQuantizer(descriptor)
            quantizer.is_weight = True
            self.add_module(quantizer_name(name), quantizer)
        device = getattr(self, self.weight_names[0]).device
        for name in (*self.input_names, *self.weight_names):
            self._modules[quantizer_name(name)].to(device)  # type: ignore[union-attr]

    def quantized_names(self) -> tuple[str, ...]:
        """Return the tensors that may have a quantizer: inputs and weights."""
        return (*super().quantized_names(), *self.weight_names)

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer

    def weight_quantizers(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """Yield (name of the parameter, its quantizer)."""
        for name in self.weight_names:
            yield name, self._modules[quantizer_name(name)]  # type: ignore[misc]


class QuantProduct(QuantMixin):
    """A layer that multiplies its input with one weight and adds a bias."""

    bias: Any  # Tensor | None; torch declares it in more than one way

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return what it multiplies with and what it adds."""
        return self._weight_quantizer(self.weight), self.bias

    def bias_in_eval(self) -> Tensor | None:
        """Return what it adds in eval mode: its bias."""
        found: Tensor | None = self.bias
        return found
