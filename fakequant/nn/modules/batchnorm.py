"""Batch norms that stand in for torch's: with fixed statistics, and folded into the layer in front of them.

They have torch's parameters, buffers and constructors, so a batch norm becomes one of them in
place by assigning its ``__class__``, and is itself again by the reverse.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fakequant.nn.forms import register_forms


class Frozen(nn.Module):
    """Stays in eval mode."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode whatever is asked."""
        return super().train(False)


class FoldedNorm(nn.Module):
    """Is computed by the layer in front of it, except in training mode; see ``folded_layers``."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of the batch in training mode; otherwise return the input."""
        normalized: Tensor = super().forward(input) if self.training else input
        return normalized


class FrozenBatchNorm1d(Frozen, nn.BatchNorm1d):
    """nn.BatchNorm1d with fixed statistics."""


class FrozenBatchNorm2d(Frozen, nn.BatchNorm2d):
    """nn.BatchNorm2d with fixed statistics."""


class FrozenBatchNorm3d(Frozen, nn.BatchNorm3d):
    """nn.BatchNorm3d with fixed statistics."""


class FrozenSyncBatchNorm(Frozen, nn.SyncBatchNorm):
    """nn.SyncBatchNorm with fixed statistics."""


class FoldedBatchNorm1d(FoldedNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d that the layer in front of it computes."""


class FoldedBatchNorm2d(FoldedNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d that the layer in front of it computes."""


class FoldedBatchNorm3d(FoldedNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d that the layer in front of it computes."""


class FoldedSyncBatchNorm(FoldedNorm, nn.SyncBatchNorm):
    """nn.SyncBatchNorm that the layer in front of it computes."""


class FrozenFoldedBatchNorm1d(Frozen, FoldedBatchNorm1d):
    """A folded nn.BatchNorm1d with fixed statistics."""


class FrozenFoldedBatchNorm2d(Frozen, FoldedBatchNorm2d):
    """A folded nn.BatchNorm2d with fixed statistics."""


class FrozenFoldedBatchNorm3d(Frozen, FoldedBatchNorm3d):
    """A folded nn.BatchNorm3d with fixed statistics."""


class FrozenFoldedSyncBatchNorm(Frozen, FoldedSyncBatchNorm):
    """A folded nn.SyncBatchNorm with fixed statistics."""


def is_moving(module: nn.Module) -> bool:
    """Whether a module is a batch norm, of any class, whose statistics move in training."""
    return isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, Frozen)


_PLAIN = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_FROZEN = FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, FrozenSyncBatchNorm
_FOLDED = FoldedBatchNorm1d, FoldedBatchNorm2d, FoldedBatchNorm3d, FoldedSyncBatchNorm
_FROZEN_FOLDED = (
    FrozenFoldedBatchNorm1d,
    FrozenFoldedBatchNorm2d,
    FrozenFoldedBatchNorm3d,
    FrozenFoldedSyncBatchNorm,
)

FROZEN: dict[type[nn.Module], type[Frozen]] = dict(zip((*_PLAIN, *_FOLDED), (*_FROZEN, *_FROZEN_FOLDED), strict=True))
"""What a batch norm becomes when it is frozen."""

FOLDED: dict[type[nn.Module], type[FoldedNorm]] = dict(
    zip((*_PLAIN, *_FROZEN), (*_FOLDED, *_FROZEN_FOLDED), strict=True)
)
"""What a batch norm becomes when it is folded."""

for _forms in (_FROZEN, _FOLDED, _FROZEN_FOLDED):
    register_forms(dict(zip(_PLAIN, _forms, strict=True)))
