"""Finding the quantizers of a model."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.modules.folded_layers import FoldedLayer
from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


class Weight(NamedTuple):
    """A parameter of a quantized module.

    Attributes:
        module: that has it.
        name: of the parameter.
    """

    module: QuantMixin
    name: str

    @property
    def tensor(self) -> Tensor:
        """What its quantizer is given now: the parameter, or what a folded batch norm makes of it, without gradient."""
        if isinstance(self.module, FoldedLayer):
            with torch.no_grad():
                return self.module.folded_weight()
        found: Tensor = getattr(self.module, self.name)
        return found


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield (full name, quantizer), each quantizer once, in order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


def check_is_module(model: object) -> None:
    """Check that a model is one.

    Raises:
        InvalidTypeError: no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def check_is_quantized(model: nn.Module) -> None:
    """Check that a model has quantizers.

    Raises:
        InvalidValueError: it has none.
    """
    if next(named_quantizers(model), None) is None:
        raise InvalidValueError(f"model: expected a quantized model, got no quantizer in {type(model).__name__}")


def weights_of_quantizers(model: nn.Module) -> dict[TensorQuantizer, Weight]:
    """Return the parameter that each weight quantizer quantizes."""
    return {
        quantizer: Weight(module, name)
        for module in model.modules()
        if isinstance(module, QuantMixin)
        for name, quantizer in module.weight_quantizers()
    }
