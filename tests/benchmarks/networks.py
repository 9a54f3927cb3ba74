"""torchvision's networks, with random weights, also where torchvision's own operators do not load."""

import torch
from torch import nn


def network(name: str) -> nn.Module:
    """Return a torchvision classifier by name."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A CUDA build of torchvision beside a CPU torch: declare the operators that the import looks up.
        network.library = library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import models

    torch.manual_seed(0)
    return getattr(models, name)(weights=None)
