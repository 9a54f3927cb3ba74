"""Running a model in float and with all of its calls in sight, and leaving it as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.modules.transformer import unfuse


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let a model run in eval mode without quantizers and fused kernels for a with block, and leave no trace of it."""
    with evaluating(model), _state_kept(model), _without_quantizers(model), _unfused(model):
        yield


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers and random number generators back to what they were."""
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    contents = {buffer: buffer.clone() for _, found in buffers for buffer in found.values() if buffer is not None}
    devices = {buffer.device for buffer in (*contents, *model.parameters()) if buffer.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, found in buffers:
            module._buffers.update(found)
        for buffer, content in contents.items():
            if not torch.equal(buffer, content):
                buffer.copy_(content)


@contextlib.contextmanager
def _without_quantizers(model: nn.Module) -> Iterator[None]:
    """Run the float model; torch's attention would run fused for quantizers that are merely off."""
    removed = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, TensorQuantizer)
    ]
    for module, name, _ in removed:
        module._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for module, name, child in removed:
            module._modules[name] = child


@contextlib.contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Run attention and encoder layers without their fused kernels, which would hide what is inside."""
    classes = [(module, type(module)) for module in model.modules()]
    unfuse(model, everywhere=True)
    try:
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls
