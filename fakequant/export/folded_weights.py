"""Layers with a batch norm folded into them go into a file with the weight and the bias that they have in eval mode.

Traced as they are, they would compute both in the graph, from parameters that no deployed layer has.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fakequant.nn.modules.folded_layers import UNFOLDED, FoldedLayer, folded_pairs


@contextlib.contextmanager
def folded_weights(model: nn.Module) -> Iterator[None]:
    """Let folded layers be plain ones with folded parameters for a with block. In eval mode they compute the same.

    Raises:
        InvalidValueError: a layer that lost its batch norm, or the reverse.
    """
    folded_pairs(model)
    layers = [module for module in model.modules() if isinstance(module, FoldedLayer)]
    before = [(layer, type(layer), dict(layer._parameters)) for layer in layers]
    parameters = [_parameters(layer) for layer in layers]
    try:
        for layer, folded in zip(layers, parameters, strict=True):
            layer.__class__ = UNFOLDED[type(layer)]  # type: ignore[assignment]
            layer._parameters.update(folded)
        yield
    finally:
        for layer, cls, originals in before:
            layer.__class__ = cls
            layer._parameters.update(originals)


def _parameters(layer: FoldedLayer) -> dict[str, nn.Parameter]:
    with torch.no_grad():
        values: dict[str, Tensor] = {
            "weight": layer.folded_weight().to(layer.weight.dtype),
            "bias": layer.bias_in_eval(),
        }
    return {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
