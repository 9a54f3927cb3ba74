"""The lasting state of a quantizer: its range, amax.

The buffer ``_amax`` is there from construction. While no range is known it has no
elements (shape ``(0,)``), so "calibrated" is a property of its shape: it survives
state_dict, deepcopy, pickle, ``.to()``, and reading it costs no device synchronization.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fakequant import arithmetic
from fakequant.errors import InvalidValueError

_KEY = "_amax"


class AmaxState(nn.Module):
    """A module whose state is one range, in float32 whatever the dtype of the model around it.

    Args:
        learned: make amax a Parameter instead of a buffer.
    """

    _amax: Tensor

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        empty = torch.empty(0, dtype=torch.float32)
        if learned:
            self._amax = nn.Parameter(empty)
        else:
            self.register_buffer(_KEY, empty)

    @property
    def is_calibrated(self) -> bool:
        """Whether amax is known."""
        return self._amax.numel() > 0

    @property
    def amax(self) -> Tensor | None:
        """The range, float32: 0-d, or with the kept axes' sizes and 1 elsewhere. None while unknown.

        Assigning checks that it is finite and not negative; None forgets it. A shape
        other than that of the present amax is an error: forget that one first.
        """
        return self._amax if self.is_calibrated else None

    @amax.setter
    def amax(self, value: object) -> None:
        device = self._amax.device
        if value is None:
            self._replace_amax(torch.empty(0, dtype=torch.float32, device=device))
            return
        new = arithmetic.check_amax(value).to(device, torch.float32)
        if not self.is_calibrated:
            self._replace_amax(new.clone())
            return
        if new.shape != self._amax.shape:
            raise InvalidValueError(f"amax: expected shape {tuple(self._amax.shape)}, got {tuple(new.shape)}")
        with torch.no_grad():
            self._amax.copy_(new)

    def _replace_amax(self, value: Tensor) -> None:
        if isinstance(self._amax, nn.Parameter):
            self._amax.data = value
            self._amax.grad = None
        else:
            self._amax = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AmaxState":
        """Follow device moves but stay float32: half() would lose ranges above 65504 and below 6e-8."""
        before = self._amax.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._amax.dtype != torch.float32:
            self._replace_amax(before.to(self._amax.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over the checkpoint's amax, known or not; a checkpoint without one (a float model's) changes nothing."""
        key = prefix + _KEY
        stored = state_dict.get(key)
        if isinstance(stored, Tensor) and not stored.is_meta and not bool((stored.isfinite() & (stored >= 0)).all()):
            error_msgs.append(f"{key}: expected finite values >= 0, got {stored}")
            return
        if isinstance(stored, Tensor) and stored.shape != self._amax.shape:
            self._replace_amax(self._amax.detach().new_empty(stored.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)
        if self._amax.dtype != torch.float32:  # assign=True
            self._replace_amax(self._amax.detach().to(torch.float32))

    def _short_amax(self) -> str:
        if not self.is_calibrated:
            return "dynamic"
        if self._amax.is_meta:
            return "meta"
        if self._amax.numel() == 1:
            return f"{self._amax.item():.4f}"
        return f"[{self._amax.min().item():.4f}, {self._amax.max().item():.4f}]({self._amax.numel()})"
