"""How a batch of data becomes the arguments of a model."""

from typing import Any

from torch import Tensor, nn

from fakequant.errors import InvalidTypeError


def model_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a batch.

    A tensor, or the first element of an (input, target) pair, is the only argument; a dict
    holds keyword arguments.

    Raises:
        InvalidTypeError: any other batch.

    >>> import torch
    >>> model_arguments([torch.zeros(1), 3])
    ((tensor([0.]),), {})
    """
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise InvalidTypeError(
        f"batch: expected a tensor, an (input, target) pair or a dict of keyword arguments, got {type(batch).__name__}"
    )


def feed(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch.

    Raises:
        InvalidTypeError: a batch that needs a ``forward`` of the user's.
    """
    try:
        args, kwargs = model_arguments(batch)
    except InvalidTypeError as error:
        raise InvalidTypeError(f"{error}. Pass forward=lambda model, batch: ...") from None
    return model(*args, **kwargs)
