"""torch's transformer encoder without its fused kernel while quantizers are at work inside.

In eval mode without gradient, nn.TransformerEncoderLayer hands the weights of linear1 and
linear2 to a fused kernel and never calls the two modules, and nn.TransformerEncoder packs
padded batches into nested tensors for it. Quantizers would be passed by in silence. With
every quantizer off, the fused kernel runs as in the float model, bit for bit.
"""

from torch import nn

from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


class UnfusedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer that calls its linear layers while they hold active quantizers."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """1 for ReLU, 2 for GELU; 0, which torch takes as "cannot be fused", while a quantizer is active."""
        return 0 if _holds_active_quantizer(self) else self.__dict__["activation_relu_or_gelu"]

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class UnfusedTransformerEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder that makes no nested tensors while it holds active quantizers."""

    @property
    def use_nested_tensor(self) -> bool:
        """As chosen at construction; False while a quantizer is active."""
        return self.__dict__["use_nested_tensor"] and not _holds_active_quantizer(self)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: UnfusedTransformerEncoderLayer,
    nn.TransformerEncoder: UnfusedTransformerEncoder,
}
_FUSED = {unfused: fused for fused, unfused in _UNFUSED.items()}


def unfuse(model: nn.Module) -> None:
    """Make every transformer encoder that holds quantizers step aside for them, in place."""
    for module in model.modules():
        if type(module) in _UNFUSED and any(isinstance(child, TensorQuantizer) for child in module.modules()):
            module.__class__ = _UNFUSED[type(module)]


def undo_unfuse(model: nn.Module) -> None:
    """Give torch's own classes back."""
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))


def _holds_active_quantizer(module: nn.Module) -> bool:
    # Both kinds of work count: quantizing, and collecting statistics.
    return any(
        isinstance(child, TensorQuantizer) and not child._disabled and (child._if_quant or child._if_calib)
        for child in module.modules()
    )
