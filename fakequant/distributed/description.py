"""What must be the same in all processes, in words, and which process differs in what."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fakequant.distributed.model_runs import shares_buffers
from fakequant.errors import CalibrationError
from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.folded_layers import folded_pairs
from fakequant.nn.sharding import is_sharded

_MISSING = "nothing of that name"
_SHOWN = 5


def description(
    model: nn.Module, quantizers: Mapping[str, TensorQuantizer], options: Mapping[str, object]
) -> dict[str, str]:
    """Return {name: words} of every option, quantizer and parameter of a calibration.

    Buffers may differ, as the statistics of BatchNorm do in training. Not so those that a folded weight is made of.
    """
    parts = {name: repr(value) for name, value in options.items()}
    parts |= {name: quantizer.descriptor.to_json() for name, quantizer in quantizers.items()}
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer):
            for key, parameter in module.named_parameters(name, recurse=False):
                parts[key] = _words(parameter)
    for name in () if shares_buffers(model) else folded_pairs(model).values():
        parts |= {f"{name}.{key}": _words(buffer) for key, buffer in model.get_submodule(name).named_buffers()}
    return parts


def digest(parts: Mapping[str, str]) -> str:
    """Return a short text that is another one for other parts or another order of them."""
    return hashlib.sha256(json.dumps(list(parts.items())).encode()).hexdigest()


def raise_difference(ranks: Sequence[int], parts: Sequence[Mapping[str, str]]) -> None:
    """Raise CalibrationError: it names each process that differs from the first, and in what."""
    lines = []
    first = parts[0]
    for rank, other in zip(ranks, parts, strict=True):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        lines += [
            f"process {rank}: {name}: expected {first.get(name, _MISSING)} as in process {ranks[0]}, "
            f"got {other.get(name, _MISSING)}"
            for name in names[:_SHOWN]
        ]
        if len(names) > _SHOWN:
            lines.append(f"process {rank}: and {len(names) - _SHOWN} more")
        if not names and list(first) != list(other):
            lines.append(f"process {rank}: expected the layers in the order of process {ranks[0]}, got another order")
    raise CalibrationError("the processes do not calibrate the same model in the same way:\n  " + "\n  ".join(lines))


def _words(parameter: Tensor) -> str:
    words = f"{parameter.dtype} {tuple(parameter.shape)}"
    if is_sharded(parameter) or parameter.is_meta:
        return words
    integer = torch.int32 if parameter.element_size() % 4 == 0 else torch.uint8
    # An integer sum is the same in any order, so on any machine.
    return f"{words} checksum {int(parameter.detach().contiguous().view(-1).view(integer).sum(dtype=torch.int64))}"
