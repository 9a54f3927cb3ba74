"""``import torchvision``, also where its compiled operators do not load: a CUDA build beside a CPU torch."""

import torch

_libraries: list[torch.library.Library] = []
"""The declared operators; they exist as long as the library that declares them."""


def import_torchvision() -> None:
    """Import torchvision. Models that call none of its operators work in any case."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision  # noqa: F401
