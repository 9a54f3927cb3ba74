"""Less activation memory in training: quantized tensors are not kept for backward but made again there."""

import threading
from typing import Any, TypeVar

import torch
from torch import nn

from fakequant.fake_quantize import recompute_quantized

_Model = TypeVar("_Model", bound=nn.Module)


class _Entered(threading.local):
    """The models whose forward this thread is in, each with what its hook has begun."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, recompute_quantized]] = []


_entered = _Entered()


def save_memory(model: _Model) -> _Model:
    """Let a model keep no quantized activation or weight for backward, in place, and return it.

    In backward, quantizers make them again of what they keep themselves. Gradients are the same, bit by
    bit; the cost is one more forward pass of each quantizer whose result a layer needs. Quantizers of
    weights' schemes (binary, ternary, DoReFa) go on as before.

    Inside gradient checkpointing and ``torch.autograd.graph.save_on_cpu`` around the model it does
    nothing: these decide what is kept. Nor does it in a compiled model, whose compiler does.

    >>> save_memory(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter, prepend=True)
        model.register_forward_hook(_leave, always_call=True)
    return model


def stop_saving_memory(model: _Model) -> _Model:
    """Undo ``save_memory``."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    return model


def _enter(model: nn.Module, args: Any) -> None:
    # Other hooks are those of a checkpoint or of save_on_cpu, or ours: of a model around this one, or of
    # this one, if a KeyboardInterrupt skipped the hook that leaves. This call then ends what that one began.
    # Only a private function of torch tells that there are any.
    if not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        saving = recompute_quantized()
        saving.__enter__()
        _entered.stack.append((model, saving))


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and _entered.stack and _entered.stack[-1][0] is model:
        _entered.stack.pop()[1].__exit__()
