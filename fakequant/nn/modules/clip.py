"""Clip: a module around functional.clip whose bounds may be trained."""

import torch
from torch import Tensor, nn

from fakequant.errors import InvalidValueError
from fakequant.nn.functional import clip


class Clip(nn.Module):
    """Clamps its input between two scalars, each fixed or learned.

    Args:
        clip_value_min: lower bound: a number or a tensor with one element.
        clip_value_max: upper bound, likewise.
        learn_min: make the lower bound a Parameter.
        learn_max: make the upper bound a Parameter.

    Raises:
        InvalidValueError: a bound with more or less than one element.

    >>> Clip(-1.0, 1.0)(torch.tensor([3.0]))
    tensor([1.])
    """

    clip_value_min: Tensor
    clip_value_max: Tensor

    def __init__(
        self,
        clip_value_min: float | Tensor,
        clip_value_max: float | Tensor,
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        self._hold("clip_value_min", clip_value_min, learn_min)
        self._hold("clip_value_max", clip_value_max, learn_max)

    def _hold(self, name: str, value: float | Tensor, learn: bool) -> None:
        bound = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        if bound.numel() != 1:
            raise InvalidValueError(f"{name}: expected one element, got shape {tuple(bound.shape)}")
        bound = bound.reshape(())
        if learn:
            self.register_parameter(name, nn.Parameter(bound))
        else:
            self.register_buffer(name, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs clamped, in their own dtype."""
        return clip(inputs, self.clip_value_min.to(inputs.dtype), self.clip_value_max.to(inputs.dtype))
