"""Finding the quantizers of a model."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

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
        """The parameter as it is now."""
        found: Tensor = getattr(self.module, self.name)
        return found


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield (full name, quantizer), each quantizer once, in order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


def weights_of_quantizers(model: nn.Module) -> dict[TensorQuantizer, Weight]:
    """Return the parameter that each weight quantizer quantizes."""
    return {
        quantizer: Weight(module, name)
        for module in model.modules()
        if isinstance(module, QuantMixin)
        for name, quantizer in module.weight_quantizers()
    }
