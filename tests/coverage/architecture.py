"""One architecture of the table: its name, its family and how it is built."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

Built: TypeAlias = tuple[nn.Module, tuple[Tensor, ...]]
"""A model with random weights and example inputs that it takes as positional arguments."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that goes through the whole pipeline.

    Args:
        name: unique; given on the command line.
        family: where it comes from; a heading of the table.
        build: makes the model and its example inputs; loads whatever packages it needs only then.
    """

    name: str
    family: str
    build: Callable[[], Built]
