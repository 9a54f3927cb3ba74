"""Activation ranges that follow the data during training, and are frozen later.

Jacob et al. 2018 (arXiv:1712.05877), section 3.1: ranges of activations are exponential
moving averages over the batches of training; weights take their extremes as they are.
"""

import warnings

from torch import nn

from fakequant.arguments import check_number
from fakequant.arithmetic import check_amax, range_of
from fakequant.collecting import naming
from fakequant.errors import InvalidValueError
from fakequant.nn.sharding import whole
from fakequant.nn.walk import check_is_quantized, named_quantizers, weights_of_quantizers
from fakequant.shortened import shortened


def follow_ranges(model: nn.Module, momentum: float = 0.01) -> None:
    """Let the range of every activation follow the data from now on, in training mode only.

    A quantizer without a range takes that of its first batch, which must run before ``torch.compile``. Learned and
    fixed ranges stay as they are, and so do those of weights; a weight without a range has that of its own values,
    until ``freeze_ranges`` keeps it. A state dict holds the ranges and not that they follow: a manifest and ``Phases``
    know, or call this again after a resume. Quantizers that only another target uses are not called, and keep what
    they were calibrated to. While ranges follow, gradient checkpointing is an error inside a compiled model, and where
    a quantizer is called more than once between two backward passes: gradients would be those of another range.

    In a distributed training each process sees its own data. DistributedDataParallel gives all of them the ranges
    of the first process at each step, which is as good where data is shuffled. FSDP, or
    ``broadcast_buffers=False``, does not: call ``average_ranges`` before ``freeze_ranges``.

    Args:
        model: quantized.
        momentum: the weight of the newest batch, above 0 and at most 1.

    Raises:
        InvalidTypeError: momentum is no number, model no nn.Module.
        InvalidValueError: a momentum out of range; no quantizer that could follow.

    >>> from fakequant import quantize
    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> _ = quantize(model)
    >>> follow_ranges(model, momentum=0.5)
    >>> _ = model(torch.tensor([[1.0, 0.5]])), model(torch.tensor([[3.0, 0.5]]))
    >>> model.input_quantizer.amax
    tensor(2.)
    """
    check_number("momentum", momentum, above=0, at_most=1)
    weights = weights_of_quantizers(model)
    following = [
        quantizer
        for _, quantizer in named_quantizers(model)
        if quantizer.is_to_calibrate
        and not (quantizer.is_weight or quantizer in weights or quantizer.descriptor.learn_amax)
    ]
    if not following:
        raise InvalidValueError("model: expected an activation quantizer whose range comes from data, got none")
    for quantizer in following:
        quantizer.momentum = momentum


def freeze_ranges(model: nn.Module) -> None:
    """Undo ``follow_ranges``: ranges stay as they are now, also those of weights that were never calibrated.

    One that is still unknown, because its quantizer was not called in training mode, goes on taking the range of
    each of its inputs: a warning names it.

    Raises:
        InvalidTypeError: model is no nn.Module.
        InvalidValueError: such a weight holds NaN or Inf; names its quantizer. No quantizers. Nothing is changed.
    """
    check_is_quantized(model)
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    following = [quantizer for quantizer in names if quantizer.momentum is not None]
    found = {}
    for quantizer, weight in weights_of_quantizers(model).items() if following else ():
        if quantizer.is_to_calibrate and not (quantizer.is_calibrated or quantizer.descriptor.learn_amax):
            found[quantizer] = range_of(quantizer.descriptor, whole(weight.tensor))
            with naming(names[quantizer]):
                check_amax(found[quantizer][0])
    unknown = [names[quantizer] for quantizer in following if not (quantizer.is_calibrated or quantizer.stands_by)]
    if unknown:
        warnings.warn(
            f"{shortened(unknown)}: expected a range from a forward in training mode, got none: each input will have "
            "its own. Calibrate, or freeze later",
            stacklevel=2,
        )
    for quantizer in following:
        quantizer.momentum = None
    for quantizer, ends in found.items():
        quantizer.set_range(*ends)
