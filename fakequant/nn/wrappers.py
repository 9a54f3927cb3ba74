"""Wrappers around a model, whose names are not those of the model that a user builds."""

from torch import nn

from fakequant.arguments import check_module
from fakequant.errors import InvalidTypeError
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.sharding import check_whole

_WRAPPED_AS = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Classes of torch, by name because importing them takes time: {class: attribute that is the model}."""


def check_is_bare(model: nn.Module) -> None:
    """Check that a model is a module that holds quantizers, no wrapper, and in one piece.

    Raises:
        InvalidTypeError: says how to unwrap it.
        InvalidValueError: its parameters are split over processes.
    """
    if isinstance(model, TensorQuantizer):
        raise InvalidTypeError(f"model: expected an nn.Module that holds quantizers, got {type(model).__name__}")
    check_is_unwrapped(model)
    check_whole(model)


def check_is_unwrapped(model: nn.Module) -> None:
    """Check that a model is a module, and no wrapper.

    Raises:
        InvalidTypeError: says how to unwrap it.
    """
    check_module(model)
    cls = type(model)
    if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPED_AS:
        attribute = _WRAPPED_AS[cls.__name__]
        raise InvalidTypeError(
            f"model: expected the model itself, got {cls.__name__} around it; give its .{attribute} instead"
        )
