"""Gradients of few bits, as DoReFa-Net trains with them.

Zhou et al. 2016 (arXiv:1606.06160), section 2.5: the gradient that comes into a layer's output is
quantized with noise before the layer computes its own gradients from it, so that they are
products of few-bit numbers, too.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fakequant.arguments import check_count
from fakequant.arithmetic import quantize_gradient
from fakequant.errors import InvalidValueError
from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.walk import check_is_quantized


class QuantizedGradients:
    """What ``quantize_gradients`` returns; ``remove()`` ends it."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Let gradients of later forward passes be, from now on."""
        for handle in self._handles:
            handle.remove()


def quantize_gradients(model: nn.Module, num_bits: int) -> QuantizedGradients:
    """Quantize the gradient that comes into the output of each quantized layer that has weights.

    The forward pass is unchanged. The first axis of an output counts the samples, each of which has
    its own range. Noise comes from torch's default generator. Call this before torch.compile compiles the
    model in its first call: torch does not see hooks that come later.

    Args:
        model: a quantized model, trained or to be trained.
        num_bits: 1 to 16; the paper has 2 to 8.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidTypeError: model is no nn.Module, num_bits no int.
        InvalidValueError: num_bits out of range; a model without a quantized layer for its present target.

    >>> from fakequant.nn.modules.linear import QuantLinear
    >>> quantize_gradients(QuantLinear(2, 2), num_bits=4).remove()
    """
    check_is_quantized(model)
    check_count("num_bits", num_bits, at_most=16)
    # The output of a layer that is made of others, such as attention, is that of one of them.
    layers = [module for module in model.modules() if isinstance(module, QuantMixin) and not _is_made_of_layers(module)]
    if not layers:
        raise InvalidValueError(
            f"model: expected layers that its present target quantizes, got none in {type(model).__name__}"
        )
    hook = functools.partial(_quantize_output_gradients, num_bits)
    return QuantizedGradients(layer.register_forward_hook(hook) for layer in layers)


def _is_made_of_layers(module: nn.Module) -> bool:
    return any(isinstance(child, QuantMixin) for child in module.children())


def _quantize_output_gradients(num_bits: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    if not isinstance(layer, QuantMixin):  # it was made float again
        return
    for tensor in pytree.tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(functools.partial(_quantized, num_bits))


def _quantized(num_bits: int, grad: Tensor) -> Tensor:
    noise = torch.rand(grad.shape, device=grad.device) - 0.5
    return quantize_gradient(grad, num_bits, noise)
