"""torchvision's detection and segmentation networks up to the tensors of their heads: no anchors, no NMS."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from architecture import Architecture, Built
from torch import Tensor, nn
from torchvision_import import import_torchvision


class _Heads(nn.Module):
    """Backbone with FPN, and the head on every level; what the anchors would be applied to.

    Args:
        backbone: returns a dict of feature maps, one a level.
        head: takes the list of them.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.head(list(self.backbone(images).values())))


class _Segmentation(nn.Module):
    """A segmentation network; its dict of outputs as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.network(images))


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    if isinstance(outputs, Tensor):
        return (outputs,)
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return tuple(tensor for part in parts for tensor in _flat(part))


def _detector(name: str, size: int, head: Callable[[nn.Module], nn.Module]) -> Built:
    import_torchvision()
    from torchvision.models import detection

    network = getattr(detection, name)(weights=None, weights_backbone=None)
    return _Heads(network.backbone, head(network)), (torch.randn(2, 3, size, size),)


def _segmentation(name: str) -> Built:
    import_torchvision()
    from torchvision.models import segmentation

    network = getattr(segmentation, name)(weights=None, weights_backbone=None)
    return _Segmentation(network), (torch.randn(2, 3, 64, 64),)


def _with_heads(name: str, size: int, head: Callable[[nn.Module], nn.Module]) -> Architecture:
    return Architecture(name, "torchvision detection", functools.partial(_detector, name, size, head))


def _segmenter(name: str) -> Architecture:
    return Architecture(name, "torchvision segmentation", functools.partial(_segmentation, name))


ARCHITECTURES = (
    _with_heads("fasterrcnn_resnet50_fpn", 128, lambda network: network.rpn.head),
    _with_heads("fasterrcnn_mobilenet_v3_large_fpn", 128, lambda network: network.rpn.head),
    _with_heads("retinanet_resnet50_fpn", 128, lambda network: network.head),
    _with_heads("fcos_resnet50_fpn", 128, lambda network: network.head),
    _with_heads("ssd300_vgg16", 300, lambda network: network.head),  # its last level has no padding to spare
    _with_heads("ssdlite320_mobilenet_v3_large", 128, lambda network: network.head),
    _segmenter("fcn_resnet50"),
    _segmenter("deeplabv3_resnet50"),
    _segmenter("deeplabv3_mobilenet_v3_large"),
    _segmenter("lraspp_mobilenet_v3_large"),
)
