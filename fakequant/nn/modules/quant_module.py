"""The two mixins that make a quantized module of a float one.

A quantized class derives from a mixin and from torch's own class and adds quantizers;
the arithmetic stays torch's. That is why a float module becomes quantized in place by
assigning its ``__class__`` and calling ``init_quantizer``, and float again by the reverse.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer

INPUT_QUANTIZER = "_input_quantizer"
WEIGHT_QUANTIZER = "_weight_quantizer"


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


class QuantInputMixin(nn.Module):
    """A module with a quantizer on its input.

    Constructor arguments are those of the float class, and keyword-only ``quant_desc_input``.
    """

    float_class: ClassVar[type[nn.Module]]
    """The torch class that this one replaces; set by ``register``."""

    default_quant_desc_input: ClassVar[QuantDescriptor] = QUANT_DESC_8BIT_PER_TENSOR

    _input_quantizer: TensorQuantizer

    def __init__(self, *args: Any, quant_desc_input: QuantDescriptor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input)

    @classmethod
    def set_default_quant_desc_input(cls, descriptor: QuantDescriptor) -> None:
        """Set the input grid of instances made from now on, of this class only."""
        cls.default_quant_desc_input = checked_grid("quant_desc_input", descriptor)

    def init_quantizer(self, quant_desc_input: QuantDescriptor | None = None) -> None:
        """Add the quantizers; None takes the class default."""
        descriptor = checked_grid("quant_desc_input", quant_desc_input or self.default_quant_desc_input)
        self._input_quantizer = TensorQuantizer(descriptor)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer


class QuantizedInputForward(QuantInputMixin):
    """The forward of a module without weight: its own, on the quantized input."""

    def forward(self, input: Tensor) -> Any:
        """Return what the float class returns for the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantMixin(QuantInputMixin):
    """A module with quantizers on its input and its ``weight``.

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

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        """Add the quantizers; None takes the class default."""
        super().init_quantizer(quant_desc_input)
        descriptor = checked_grid("quant_desc_weight", quant_desc_weight or self.default_quant_desc_weight)
        self._weight_quantizer = TensorQuantizer(descriptor)
        self._weight_quantizer.to(self.weight.device)
        self._input_quantizer.to(self.weight.device)

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer
