"""Hugging Face encoders from their configurations, with few layers and small hidden sizes."""

import functools
from typing import Any

import torch
from architecture import Architecture, Built
from torch import Tensor, nn
from torchvision_import import import_torchvision

_TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_LENGTH = 16


class _TextEncoder(nn.Module):
    """A text encoder that takes tensors by position and returns its last hidden state."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Encoder(nn.Module):
    """An encoder of images or sound; returns its last hidden state."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, values: Tensor) -> Tensor:
        return self.encoder(values).last_hidden_state


def _encoder(config_name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()
    import transformers

    config = getattr(transformers, config_name)(**options)
    name = config_name.replace("Config", "Model")
    # Vision towers have a configuration of their own but are no entry of AutoModel.
    return getattr(transformers, name)(config)


def _build_text(config_name: str, options: dict[str, Any]) -> Built:
    encoder = _encoder(config_name, options)
    ids = torch.randint(5, _TEXT["vocab_size"], (2, _LENGTH))  # below 5 are padding and other marks
    mask = torch.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    return _TextEncoder(encoder), (ids, mask)


def _build_image(config_name: str, options: dict[str, Any]) -> Built:
    return _Encoder(_encoder(config_name, options)), (torch.randn(2, 3, 64, 64),)


def _build_sound(config_name: str, options: dict[str, Any]) -> Built:
    return _Encoder(_encoder(config_name, options)), (torch.randn(2, 4000),)


def _text(name: str, config_name: str, **options: Any) -> Architecture:
    return Architecture(name, "transformers", functools.partial(_build_text, config_name, options))


def _image(name: str, config_name: str, **options: Any) -> Architecture:
    return Architecture(name, "transformers", functools.partial(_build_image, config_name, options))


_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}

ARCHITECTURES = (
    _text("bert", "BertConfig", **_TEXT),
    _text("roberta", "RobertaConfig", **_TEXT),
    _text("electra", "ElectraConfig", **_TEXT, embedding_size=32),
    _text("distilbert", "DistilBertConfig", vocab_size=200, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    _text("albert", "AlbertConfig", **_TEXT, embedding_size=32),
    _text("mpnet", "MPNetConfig", **_TEXT),
    _text(
        "deberta_v2",
        "DebertaV2Config",
        **_TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    _image("hf_vit", "ViTConfig", **_VISION, image_size=64),
    _image("clip_vision", "CLIPVisionConfig", **_VISION, image_size=64),
    _image(
        "hf_swin",
        "SwinConfig",
        image_size=64,
        embed_dim=32,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        attn_implementation="eager",  # torch 2.13 cannot export the other's view of a transposed tensor
    ),
    _image(
        "segformer",
        "SegformerConfig",
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 64],
        num_attention_heads=[1, 2, 4, 4],
    ),
    _image(
        "hf_mobilevit",
        "MobileViTConfig",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[16, 32, 48, 64, 64, 64, 128],
    ),
    Architecture(
        "wav2vec2",
        "transformers",
        functools.partial(
            _build_sound,
            "Wav2Vec2Config",
            {**_VISION, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        ),
    ),
)
