"""torchvision's classifiers."""

import functools
from typing import Any

import torch
from architecture import Architecture, Built
from torchvision_import import import_torchvision


def _build(name: str, size: int, options: dict[str, Any]) -> Built:
    import_torchvision()
    from torchvision import models

    return getattr(models, name)(weights=None, **options), (torch.randn(2, 3, size, size),)


def _classifier(name: str, size: int = 64, **options: Any) -> Architecture:
    return Architecture(name, "torchvision", functools.partial(_build, name, size, options))


ARCHITECTURES = (
    _classifier("alexnet", 224),  # smaller images are blown up again by its adaptive pooling
    _classifier("vgg11_bn", 224),
    _classifier("resnet18"),
    _classifier("resnet50"),
    _classifier("resnext50_32x4d"),
    _classifier("wide_resnet50_2"),
    _classifier("densenet121"),
    _classifier("googlenet", aux_logits=False, init_weights=False),
    _classifier("inception_v3", 96, aux_logits=False, init_weights=False),
    _classifier("squeezenet1_1"),
    _classifier("mobilenet_v2"),
    _classifier("mobilenet_v3_large"),
    _classifier("mobilenet_v3_small"),
    _classifier("mnasnet1_0"),
    _classifier("shufflenet_v2_x1_0"),
    _classifier("efficientnet_b0"),
    _classifier("efficientnet_v2_s"),
    _classifier("regnet_y_400mf"),
    _classifier("regnet_x_400mf"),
    _classifier("convnext_tiny"),
    _classifier("vit_b_16", image_size=64),
    _classifier("swin_t"),
    _classifier("swin_v2_t"),
    _classifier("maxvit_t", 224),  # its windows of 7 divide no smaller image
)
