"""How a model runs: without being changed, or once more for gradient checkpointing."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradient for a with block; every module then gets its own mode back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def is_repeated() -> bool:
    """Whether this forward runs in a backward pass, where gradient checkpointing repeats it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
