"""timm's classifiers, of families that torchvision does not have."""

import functools
from typing import Any

import torch
from architecture import Architecture, Built
from torchvision_import import import_torchvision


def _build(name: str, size: int, options: dict[str, Any]) -> Built:
    import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False, **options), (torch.randn(2, 3, size, size),)


def _classifier(name: str, size: int = 64, **options: Any) -> Architecture:
    return Architecture(name, "timm", functools.partial(_build, name, size, options))


ARCHITECTURES = (
    _classifier("resnest14d"),
    _classifier("res2net50_26w_4s"),
    _classifier("ecaresnet26t"),
    _classifier("seresnet18"),
    _classifier("skresnet18"),
    _classifier("dpn68"),
    _classifier("dla34"),
    _classifier("hrnet_w18_small"),
    _classifier("ghostnet_100"),
    _classifier("tf_efficientnet_lite0"),
    _classifier("mobilenetv4_conv_small"),
    _classifier("repvgg_a0"),
    _classifier("cspresnet50"),
    _classifier("cspdarknet53"),
    _classifier("ese_vovnet19b_dw"),
    _classifier("mixnet_s"),
    _classifier("nf_resnet26"),  # weights are standardized at every call
    _classifier("nfnet_l0"),
    _classifier("convmixer_768_32"),
    _classifier("poolformer_s12"),
    _classifier("efficientvit_b0"),
    _classifier("fastvit_t8"),
    _classifier("edgenext_xx_small"),
    _classifier("mobilevit_xxs"),
    _classifier("levit_128s", 224),  # its attention biases are laid out for this size
    _classifier("deit_tiny_patch16_224", img_size=64),
    _classifier("cait_xxs24_224", img_size=64, depth=4),
    _classifier("hgnetv2_b0"),
    _classifier("repvit_m0_9"),
    _classifier("mixer_s32_224", img_size=64),
    _classifier("coat_lite_tiny", img_size=64),
    _classifier("pvt_v2_b0"),
    _classifier("xcit_nano_12_p16_224", depth=4),
)
