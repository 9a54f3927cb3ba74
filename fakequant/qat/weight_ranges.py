"""Ranges of weights that are taken anew in the course of training."""

import torch
from torch import nn

from fakequant.calib import DataRange
from fakequant.calib.methods import check_method
from fakequant.collecting import calibrator_of, method_of, naming
from fakequant.errors import InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.sharding import whole
from fakequant.nn.walk import Weight, check_is_quantized, named_quantizers, weights_of_quantizers


@torch.no_grad()
def reestimate_weights(model: nn.Module, method: str = "max") -> None:
    """Give every weight the range of its values as they are now, on its present grid.

    Fixed and learned ranges stay. So do those of weights that a function gets, such as ``F.linear(x, weight)`` in
    a forward: no layer tells which they are. A weight that ``fully_shard`` has split is gathered for this, one at
    a time: then all processes call this at the same step, as they do by ``Phases``.

    Args:
        model: quantized.
        method: "max"; or "mse", a search. ResNet-18 takes 9 ms and 3 to 5 s on one core of a CPU: the first is
            cheap at every step, the second now and then. A calibrator of one's own that a grid names has a method
            of its own.

    Raises:
        CalibrationError: a weight holds NaN or Inf; names its quantizer. Nothing is changed.
        InvalidTypeError: model is no nn.Module; a method that is no str.
        InvalidValueError: an unknown method, or "lsq", which is for ranges that are learned; a model without
            quantizers.

    >>> from fakequant.nn import QuantLinear
    >>> layer = QuantLinear(2, 1)
    >>> _ = nn.init.constant_(layer.weight, 3.0)
    >>> reestimate_weights(layer)
    >>> layer.weight_quantizer.amax
    tensor([[3.]])
    """
    check_is_quantized(model)
    check_method("method", method, is_weight=True)
    if method == "lsq":
        raise InvalidValueError("method: expected one for ranges that are not learned, got 'lsq'; learned ones stay")
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    found = {
        quantizer: _range(names[quantizer], quantizer, weight, method)
        for quantizer, weight in weights_of_quantizers(model).items()
        if quantizer.is_to_calibrate and not quantizer.descriptor.learn_amax
    }
    for quantizer, ends in found.items():
        if ends is not None:
            quantizer.replace_range(*ends)


def _range(name: str, quantizer: TensorQuantizer, weight: Weight, method: str) -> DataRange | None:
    """Return the range that a calibrator finds; None for a weight without elements."""
    calibrator = calibrator_of(name, quantizer, method)
    with naming(name):
        calibrator.collect(whole(weight.tensor))
        return calibrator.compute_range(method_of(quantizer, method))
