"""Frozen batch norms for fine-tuning: normalize with the running statistics and never update them.

Near the end of training and in quantization-aware fine-tuning, batch statistics are
noise (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). A frozen layer ignores
``model.train()``; its weight and bias go on training.
"""

import warnings
from typing import TypeVar

from torch import nn

from fakequant.arguments import check_module
from fakequant.errors import InvalidValueError
from fakequant.nn import QuantInputMixin
from fakequant.nn.modules.batchnorm import FROZEN, is_moving
from fakequant.shortened import shortened

_Model = TypeVar("_Model", bound=nn.Module)


def freeze_batchnorm(model: _Model) -> _Model:
    """Freeze the statistics of every batch norm of a model, folded or not, in place, and return it.

    Those of other classes than torch's, such as timm's BatchNormAct2d, go on moving: a warning names them.

    Raises:
        InvalidTypeError: model is no nn.Module.
        InvalidValueError: a batch norm whose own input is quantized. Nothing is frozen.

    >>> norm = freeze_batchnorm(nn.BatchNorm2d(3)).train()
    >>> norm.training
    False
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantInputMixin) and module.float_class in FROZEN:
            found = type(module).__name__
            raise InvalidValueError(f"{name or 'model'}: expected a batch norm without quantizers, got {found}")
    for module in model.modules():
        frozen = FROZEN.get(type(module))
        if frozen is not None:
            module.__class__ = frozen
            module.training = False
    moving = {name or "model": type(norm).__name__ for name, norm in model.named_modules() if is_moving(norm)}
    if moving:
        found = ", ".join(sorted(set(moving.values())))
        warnings.warn(
            f"{shortened(list(moving))}: expected batch norms of torch's own classes, got {found}. Their "
            "statistics go on moving; call eval() on them after each model.train()",
            stacklevel=2,
        )
    return model


def unfreeze_batchnorm(model: _Model) -> _Model:
    """Undo ``freeze_batchnorm``; the layers take the mode of the next ``train()`` or ``eval()``.

    Raises:
        InvalidTypeError: model is no nn.Module.
    """
    check_module(model)
    thawed = {frozen: plain for plain, frozen in FROZEN.items()}
    for module in model.modules():
        if type(module) in thawed:
            module.__class__ = thawed[type(module)]  # type: ignore[index]
    return model
