"""How long quantization-aware training goes on, and at which learning rate."""

import dataclasses
import functools
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fakequant.arguments import check_count, check_number, check_optimizer


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A learning rate and a number of steps, over which half a cosine brings it down.

    Args:
        lr: at the beginning.
        steps: of the optimizer.

    Raises:
        InvalidTypeError: lr is no number, steps no int.
        InvalidValueError: lr that is not positive and finite; fewer than one step.

    >>> FineTuning.after_training(lr=0.1, steps=450_000)
    FineTuning(lr=0.001, steps=45000)
    """

    lr: float
    steps: int

    def __post_init__(self) -> None:
        """Check both."""
        check_number("lr", self.lr, above=0)
        check_count("steps", self.steps)

    @classmethod
    def after_training(
        cls, lr: float, steps: int, *, lr_fraction: float = 0.01, step_fraction: float = 0.1
    ) -> "FineTuning":
        """Return what suits a model that was trained in float before: 1 % of the learning rate, 10 % of the steps.

        Source: the recommendation of NVIDIA's pytorch-quantization (user guide, "Quantization Aware Training"),
        by the authors of Wu et al. 2020 (arXiv:2004.09602).

        Args:
            lr: the highest of the float training.
            steps: of the optimizer in the float training.
            lr_fraction: of lr to begin with.
            step_fraction: of steps to go on for; at least one step.

        Raises:
            InvalidTypeError: no number, or steps no int.
            InvalidValueError: one that is not positive and finite.
        """
        check_number("lr", lr, above=0)
        check_count("steps", steps)
        check_number("lr_fraction", lr_fraction, above=0)
        check_number("step_fraction", step_fraction, above=0)
        return cls(lr * lr_fraction, max(1, round(steps * step_fraction)))

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return a scheduler to be stepped after each step of the optimizer.

        The learning rate of each parameter group comes down from its own to 1 % of that, as in the source
        above, and stays there after the last step.

        Raises:
            InvalidTypeError: no optimizer.
        """
        check_optimizer(optimizer)
        return LambdaLR(optimizer, functools.partial(_half_cosine, self.steps))


_LAST = 0.01
"""Share of the learning rate at the end."""


def _half_cosine(steps: int, done: int) -> float:
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * min(done / steps, 1.0))) / 2
