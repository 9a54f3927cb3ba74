"""Finding the quantizers of a model."""

from collections.abc import Iterator

from torch import nn

from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield (full name, quantizer), each quantizer once, in order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


def weights_of_quantizers(model: nn.Module) -> dict[TensorQuantizer, QuantMixin]:
    """Return the module whose ``weight`` each weight quantizer quantizes."""
    return {module.weight_quantizer: module for module in model.modules() if isinstance(module, QuantMixin)}
