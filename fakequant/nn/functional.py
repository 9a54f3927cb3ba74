"""Functions of fakequant.nn that are no quantizers."""

import torch
from torch import Tensor


def clip(input: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """Return ``max(min(input, clip_value_max), clip_value_min)``, with gradients for the bounds.

    The bounds broadcast against input. The gradient reaches input strictly inside the
    bounds; at and beyond a bound it goes to that bound, summed to its shape (PACT, arXiv:1805.06085).

    >>> clip(torch.tensor([-2.0, 0.5, 2.0]), torch.tensor(-1.0), torch.tensor(1.0))
    tensor([-1.0000,  0.5000,  1.0000])
    """
    capped = torch.where(input >= clip_value_max, clip_value_max, input)
    return torch.where(capped <= clip_value_min, clip_value_min, capped)
