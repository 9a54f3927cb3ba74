"""State that moves with every forward, where gradient checkpointing runs a forward once more in the backward pass."""

import torch
from torch import Tensor

from fakequant.errors import TrainingError


class Moves:
    """How often a state moved since the last backward pass through what read it."""

    def __init__(self) -> None:
        self._count = 0
        self._is_over = False

    def add(self) -> None:
        """Count one more."""
        if torch.compiler.is_compiling():
            return
        if self._is_over:
            self._count, self._is_over = 0, False
        self._count += 1

    def end_with(self, output: Tensor) -> None:
        """Begin to count anew after the backward pass of a tensor."""
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(self._end)

    def check(self, what: str) -> None:
        """Refuse a second forward that cannot have the state of the first, because a third one has moved it since.

        Raises:
            TrainingError: the state moved more than once.
        """
        if self._count > 1:
            raise TrainingError(
                f"{what}: expected one call between two backward passes, because gradient checkpointing repeats it and "
                f"its state moves with each call, got {self._count}: gradients would be wrong. Call "
                "fakequant.qat.freeze_ranges and freeze_batchnorm first, or leave this part out of the checkpoint. "
                "After forwards in training mode that no backward follows, call model.train()"
            )

    def _end(self, grad: Tensor) -> None:
        self._is_over = True
