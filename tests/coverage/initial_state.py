"""A state in which values flow: as built, with random weights, many networks compute next to nothing.

In eval mode a BatchNorm that has seen no data divides by 1, so a deep network's activations
vanish or explode; and some end in a layer or scale a branch by a gain that starts at zero.
Every comparison of codes would then be one of zeros.
"""

import torch
from batches import another
from torch import Tensor, nn

_BATCHES = 4
"""One batch of 2 leaves channels of a 1x1 map with a variance near zero."""


def let_values_flow(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fill weights and gains that are all zero, and give every BatchNorm statistics of inputs like these."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" not in name and not parameter.any():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        model.train()
        for _ in range(_BATCHES):
            model(*another(inputs))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    model.eval()
