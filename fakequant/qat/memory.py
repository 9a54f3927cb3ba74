"""Less memory in training: quantized weights are not kept for backward but made again there."""

from typing import TypeVar

from torch import nn

from fakequant.nn.walk import check_is_quantized, named_quantizers

_Model = TypeVar("_Model", bound=nn.Module)


def save_memory(model: _Model) -> _Model:
    """Let a training step keep no quantized weight for backward, in place, and return the model.

    In backward, quantizers make activations again of what they keep themselves. For weights that is a choice:
    a copy of each, or one more forward pass of its quantizer. Gradients are the same, bit by bit. Weights of
    fewer than 32768 elements, and on schemes (binary, ternary, DoReFa), are kept in any case. In a compiled
    model it does nothing: the compiler decides what is kept.

    Raises:
        InvalidValueError: the model has no quantizers.

    >>> from fakequant.nn import QuantLinear
    >>> save_memory(QuantLinear(2, 2)).weight_quantizer.saves_memory
    True
    """
    return _set(model, True)


def stop_saving_memory(model: _Model) -> _Model:
    """Undo ``save_memory``.

    Raises:
        InvalidValueError: the model has no quantizers.
    """
    return _set(model, False)


def _set(model: _Model, saves_memory: bool) -> _Model:
    check_is_quantized(model)
    for _, quantizer in named_quantizers(model):
        quantizer.saves_memory = saves_memory and quantizer.is_weight
    return model
