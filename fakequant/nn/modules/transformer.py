"""torch's transformer encoder without its fused kernel, and which modules have to step aside for quantizers.

In eval mode without gradient, nn.TransformerEncoderLayer hands the weights of linear1 and
linear2 to a fused kernel and never calls the two modules, and nn.TransformerEncoder packs
padded batches into nested tensors for it. Quantizers would be passed by in silence, and
recorders would see nothing. With every quantizer off, the fused kernel runs as in the
float model, bit for bit.
"""

from torch import nn

from fakequant.nn.forms import register_forms
from fakequant.nn.modules.attention import UnfusedMultiheadAttention, has_only_idle_quantizers
from fakequant.nn.modules.quant_attention import QuantMultiheadAttention
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


class UnfusedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer that calls its layers one by one, unless its quantizers are all idle."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """1 for ReLU, 2 for GELU; 0, which torch takes as "cannot be fused", unless its quantizers are all idle."""
        return self.__dict__["activation_relu_or_gelu"] if has_only_idle_quantizers(self) else 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class UnfusedTransformerEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder that makes no nested tensors, unless the quantizers of each layer are all idle."""

    @property
    def use_nested_tensor(self) -> bool:
        """As chosen at construction; False while a layer is unfused, which takes no nested tensors."""
        unfused = (UnfusedTransformerEncoder, UnfusedTransformerEncoderLayer)
        idle = (has_only_idle_quantizers(module) for module in (self, *self.layers) if isinstance(module, unfused))
        return self.__dict__["use_nested_tensor"] and all(idle)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: UnfusedTransformerEncoderLayer,
    nn.TransformerEncoder: UnfusedTransformerEncoder,
    nn.MultiheadAttention: UnfusedMultiheadAttention,
}
_PLACED = {**_UNFUSED, QuantMultiheadAttention: UnfusedMultiheadAttention}
"""What becomes what where quantizers go to the calls inside."""

_FUSED = {unfused: fused for fused, unfused in _UNFUSED.items()}

register_forms(_UNFUSED)


def unfuse(model: nn.Module, *, everywhere: bool = False) -> None:
    """Make every attention and transformer encoder that holds quantizers step aside for them, in place.

    Args:
        model: any module.
        everywhere: also those without quantizers, and those with quantizers of their own, so that a recorder
            sees each call inside.
    """
    classes = _PLACED if everywhere else _UNFUSED
    for module in model.modules():
        if type(module) in classes and (everywhere or _holds_quantizers(module)):
            module.__class__ = classes[type(module)]


def undo_unfuse(model: nn.Module, *, everywhere: bool = True) -> None:
    """Give torch's own classes back, in place.

    Args:
        model: any module.
        everywhere: also to those that hold quantizers.
    """
    for module in model.modules():
        if type(module) in _FUSED and (everywhere or not _holds_quantizers(module)):
            module.__class__ = _FUSED[type(module)]


def _holds_quantizers(module: nn.Module) -> bool:
    return any(isinstance(child, TensorQuantizer) for child in module.modules())
