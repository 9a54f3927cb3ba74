"""Fewer bits in the course of training, from a grid that is easy to train on to the one that is wanted."""

import fnmatch
from collections.abc import Mapping

from torch import nn

from fakequant.arguments import check_count
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import MAX_BITS, MIN_BITS
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.walk import check_is_quantized, named_quantizers
from fakequant.shortened import shortened


def lower_bits(model: nn.Module, num_bits: int | Mapping[str, int]) -> None:
    """Give quantizers fewer bits, on the grids of every target. Ranges stay as they are.

    Only integer grids of more bits change, so 8 leaves what has 4 as it is. The best range for fewer bits is a
    much narrower one, and training does not find it. So take all of them anew after this, as from the start:
    ``calibrate(model, batches, "mse", weight_method="mse")``; ``reestimate_weights(model, "mse")`` does weights
    alone.

    Args:
        model: quantized.
        num_bits: of all, or {shell pattern over names of quantizers: number}, of which the last match wins:
            ``{"*": 4, "conv1.*": 8, "fc.*": 8}`` keeps the first and the last layer at 8.

    Raises:
        InvalidTypeError: a number of bits that is no int, a pattern that is no str; model is no nn.Module.
        InvalidValueError: one out of range; a pattern that matches no quantizer on an integer grid; none of these.
            Nothing is changed.

    >>> from fakequant.nn import QuantLinear
    >>> layer = QuantLinear(2, 1)
    >>> lower_bits(layer, {"*": 6, "*weight*": 4})
    >>> layer.input_quantizer.num_bits, layer.weight_quantizer.num_bits
    (6, 4)
    """
    check_is_quantized(model)
    wanted = num_bits if isinstance(num_bits, Mapping) else {"*": num_bits}
    quantizers = {
        name: quantizer
        for name, quantizer in named_quantizers(model)
        if any(_bits(grid) for grid in (quantizer.descriptor, *quantizer.grids.values()))
    }
    if not quantizers or not wanted:
        found = "no bits" if quantizers else "no integer grid"
        raise InvalidValueError(f"num_bits: expected bits for quantizers on integer grids, got {found}")
    for pattern, bits in wanted.items():
        if not isinstance(pattern, str):
            raise InvalidTypeError(f"num_bits: expected patterns of names as keys, got {pattern!r}")
        check_count(f"num_bits[{pattern!r}]", bits, at_least=MIN_BITS, at_most=MAX_BITS)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in quantizers):
            raise InvalidValueError(
                f"num_bits: expected patterns that match a quantizer on an integer grid, got {pattern!r}, which "
                f"matches none of {len(quantizers)}: {shortened(list(quantizers), 8)}"
            )
    for name, quantizer in quantizers.items():
        matching = [bits for pattern, bits in wanted.items() if fnmatch.fnmatchcase(name, pattern)]
        if matching:
            quantizer.descriptor = _lowered(quantizer.descriptor, matching[-1])
            quantizer.grids = {target: _lowered(grid, matching[-1]) for target, grid in quantizer.grids.items()}


def _lowered(grid: QuantDescriptor, num_bits: int) -> QuantDescriptor:
    return grid.replace(num_bits=num_bits) if _bits(grid) > num_bits else grid


def _bits(grid: QuantDescriptor) -> int:
    """Return how many bits an integer grid has; 0 for a float format."""
    return grid.num_bits if isinstance(grid.num_bits, int) else 0
