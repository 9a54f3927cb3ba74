"""State that a forward reads and then updates, in a compiled model.

The compiler may read it again in the backward pass, and get wrong gradients (torch 2.13,
pytorch/pytorch#197039), but never by itself calls an op twice that it does not know.
"""

import torch
from torch import Tensor

from fakequant.errors import TrainingError

_LIBRARY = torch.library.Library("fakequant", "FRAGMENT")
_LIBRARY.define("snapshot(Tensor x) -> Tensor")
_LIBRARY.impl("snapshot", torch.clone, "CompositeExplicitAutograd")


def snapshot(x: Tensor) -> Tensor:
    """Return a copy of x as it is now, which the backward pass of a compiled model reads as well.

    Raises:
        TrainingError: while compiling, ``torch.utils.checkpoint`` wraps a part of the model that this is in.
    """
    copy: Tensor = torch.ops.fakequant.snapshot(x)
    return copy


def _traced(x: Tensor) -> Tensor:
    # A checkpoint marks what is traced inside it as to be repeated, ops that the compiler does not know included.
    if "recompute" in torch.fx.traceback.get_current_meta():
        raise TrainingError(
            "expected no torch.utils.checkpoint inside a compiled model whose ranges or folded batch norms move with "
            "every step, got one: its backward pass would read those of the next step and give wrong gradients. Call "
            "fakequant.qat.freeze_ranges and freeze_batchnorm first, or use only one of checkpoint and torch.compile"
        )
    return torch.empty_like(x)


_LIBRARY.impl("snapshot", _traced, "Meta")
