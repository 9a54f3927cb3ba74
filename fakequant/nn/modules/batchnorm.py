"""Batch norms that stand in for torch's: with fixed statistics, and folded into the layer in front of them.

They have torch's parameters, buffers and constructors, so a batch norm becomes one of them in
place by assigning its ``__class__``, and is itself again by the reverse.
"""

from typing import Any, ClassVar

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

    unfolded_class: ClassVar[type[nn.Module]]
    """The class that it had before."""

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

    unfolded_class = nn.BatchNorm1d


class FoldedBatchNorm2d(FoldedNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d that the layer in front of it computes."""

    unfolded_class = nn.BatchNorm2d


class FoldedBatchNorm3d(FoldedNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d that the layer in front of it computes."""

    unfolded_class = nn.BatchNorm3d


class FoldedSyncBatchNorm(FoldedNorm, nn.SyncBatchNorm):
    """nn.SyncBatchNorm that the layer in front of it computes."""

    unfolded_class = nn.SyncBatchNorm


class FrozenFoldedBatchNorm1d(Frozen, FoldedBatchNorm1d):
    """A folded nn.BatchNorm1d with fixed statistics."""

    unfolded_class = FrozenBatchNorm1d


class FrozenFoldedBatchNorm2d(Frozen, FoldedBatchNorm2d):
    """A folded nn.BatchNorm2d with fixed statistics."""

    unfolded_class = FrozenBatchNorm2d


class FrozenFoldedBatchNorm3d(Frozen, FoldedBatchNorm3d):
    """A folded nn.BatchNorm3d with fixed statistics."""

    unfolded_class = FrozenBatchNorm3d


class FrozenFoldedSyncBatchNorm(Frozen, FoldedSyncBatchNorm):
    """A folded nn.SyncBatchNorm with fixed statistics."""

    unfolded_class = FrozenSyncBatchNorm


def is_moving(module: nn.Module) -> bool:
    """Whether a module is a batch norm, of any class, whose statistics move in training."""
    return isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, Frozen)


FROZEN: dict[type[nn.Module], type[Frozen]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
    FoldedBatchNorm1d: FrozenFoldedBatchNorm1d,
    FoldedBatchNorm2d: FrozenFoldedBatchNorm2d,
    FoldedBatchNorm3d: FrozenFoldedBatchNorm3d,
    FoldedSyncBatchNorm: FrozenFoldedSyncBatchNorm,
}
"""What a batch norm becomes when it is frozen."""

_FOLDED = (FoldedBatchNorm1d, FoldedBatchNorm2d, FoldedBatchNorm3d, FoldedSyncBatchNorm)
_FROZEN_FOLDED = (
    FrozenFoldedBatchNorm1d,
    FrozenFoldedBatchNorm2d,
    FrozenFoldedBatchNorm3d,
    FrozenFoldedSyncBatchNorm,
)

FOLDED: dict[type[nn.Module], type[FoldedNorm]] = {cls.unfolded_class: cls for cls in (*_FOLDED, *_FROZEN_FOLDED)}
"""What a batch norm becomes when it is folded."""

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
for _forms in ((FROZEN[plain] for plain in _PLAIN), _FOLDED, _FROZEN_FOLDED):
    register_forms(dict(zip(_PLAIN, _forms, strict=True)))
