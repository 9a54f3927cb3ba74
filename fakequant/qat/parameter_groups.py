"""Parameter groups for an optimizer: learned ranges apart from everything else."""

from typing import Any

from torch import Tensor, nn

from fakequant.arguments import check_number
from fakequant.nn.walk import named_quantizers


def parameter_groups(
    model: nn.Module, lr: float, *, range_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the groups of parameters to give to any optimizer of torch.

    Learned ranges have no weight decay, which would pull every range towards zero.

    Args:
        model: quantized; wrapped (DDP, compiled) or not.
        lr: learning rate.
        range_lr: that of learned ranges; None for the same.
        weight_decay: of all but learned ranges.

    Returns:
        One group, and one more if ranges are learned.

    Raises:
        InvalidTypeError: model is no nn.Module; a rate or the decay is no number, and a rate no tensor.
        InvalidValueError: one that is negative or not finite.

    >>> from fakequant import QuantDescriptor
    >>> from fakequant.nn import QuantLinear
    >>> layer = QuantLinear(4, 2, quant_desc_weight=QuantDescriptor(4, learn_amax="lsq"))
    >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(layer, 0.1, weight_decay=1e-4)]
    [(2, 0.0001), (1, 0.0)]
    """
    for name, rate in (("lr", lr), ("range_lr", lr if range_lr is None else range_lr)):
        if not isinstance(rate, Tensor):  # which some optimizers of torch take
            check_number(name, rate, at_least=0)
    check_number("weight_decay", weight_decay, at_least=0)
    ranges = [parameter for _, quantizer in named_quantizers(model) for parameter in quantizer.parameters()]
    of_ranges = {id(parameter) for parameter in ranges}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_ranges]
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": ranges, "lr": lr if range_lr is None else range_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
