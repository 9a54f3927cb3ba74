"""Frozen batch norms for fine-tuning: normalize with the running statistics and never update them.

Near the end of training and in quantization-aware fine-tuning, batch statistics are
noise (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). A frozen layer ignores
``model.train()``; its weight and bias go on training.
"""

from typing import Any, TypeVar

from torch import nn

from fakequant.errors import InvalidValueError
from fakequant.nn import QuantInputMixin

_Model = TypeVar("_Model", bound=nn.Module)


class _Frozen(nn.Module):
    """Stays in eval mode."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode whatever is asked."""
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """nn.BatchNorm1d with fixed statistics."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """nn.BatchNorm2d with fixed statistics."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """nn.BatchNorm3d with fixed statistics."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """nn.SyncBatchNorm with fixed statistics."""


_FROZEN: dict[type[nn.Module], type[_Frozen]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def freeze_batchnorm(model: _Model) -> _Model:
    """Freeze the statistics of every batch norm of a model, in place, and return it.

    Raises:
        InvalidValueError: a batch norm whose own input is quantized. Nothing is frozen.

    >>> norm = freeze_batchnorm(nn.BatchNorm2d(3)).train()
    >>> norm.training
    False
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantInputMixin) and module.float_class in _FROZEN:
            found = type(module).__name__
            raise InvalidValueError(f"{name or 'model'}: expected a batch norm without quantizers, got {found}")
    for module in model.modules():
        frozen = _FROZEN.get(type(module))
        if frozen is not None:
            module.__class__ = frozen
            module.training = False
    return model


def unfreeze_batchnorm(model: _Model) -> _Model:
    """Undo ``freeze_batchnorm``; the layers take the mode of the next ``train()`` or ``eval()``."""
    thawed = {frozen: plain for plain, frozen in _FROZEN.items()}
    for module in model.modules():
        if type(module) in thawed:
            module.__class__ = thawed[type(module)]  # type: ignore[index]
    return model
