"""Batch norms folded into the layers in front of them while a model trains.

See ``fakequant.nn.modules.folded_layers`` for what a folded pair computes.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fakequant.arguments import check_module
from fakequant.batches import model_arguments
from fakequant.call_sites import Call, Role, TensorGraph, is_owner, record
from fakequant.call_sites.containers import CALL_SITES
from fakequant.call_sites.tensor_graph import sole_use
from fakequant.descriptor_fields import UNIFORM
from fakequant.errors import InvalidValueError
from fakequant.layers import type_name_of
from fakequant.nn import QuantInputMixin, TensorQuantizer
from fakequant.nn.modules.batchnorm import FOLDED, FoldedNorm
from fakequant.nn.modules.folded_layers import FOLDED_LAYERS, fold, folded_pairs, unfold
from fakequant.nn.modules.quant_module import QuantProduct
from fakequant.nn.sharding import is_sharded

_Model = TypeVar("_Model", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What became of the batch norms of a model; ``print`` it.

    Args:
        folded: {name of a layer: name of the batch norm that is folded into it}.
        left: {name of a batch norm: why it stays as it is}.
    """

    folded: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        """Return how many were folded, then every other one with its reason."""
        lines = [f"{len(self.folded)} of {len(self.folded) + len(self.left)} batch norms folded"]
        return "\n".join([*lines, *(f"  {name or '(root)'}: {reason}" for name, reason in self.left.items())])


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> FoldReport:
    """Fold every batch norm into the quantized layer in front of it, in place, for training.

    From now on the weight times gamma / sigma is quantized, as it will be deployed, by the running sigma. In
    training mode the batch's statistics normalize as before. In eval mode, and once ``freeze_batchnorm`` was
    called, the layer computes the norm as well, exactly as in an exported file, and the norm returns its input.
    Names in the state dict stay, and so do parameters and modules.

    Which layer is in front of which norm is seen in one forward of the example, in eval mode. Calibrated ranges of
    weights follow the weights; with one for each channel they are multiplied by the magnitude of gamma / sigma. They
    stay from then on, while gamma and sigma move: let ``reestimate_weights`` follow, or learn them.

    With all quantizers off, training is bit-identical to the float model; eval mode cannot be, since the weights are
    multiplied first, and is so up to rounding (4 ulp of the largest output at most, of one layer).

    Gradient checkpointing repeats a forward and moves statistics twice a step, as it does in torch's own norms. Inside
    a compiled model it is an error while norms still move, since torch would get their gradients wrong: freeze them
    first. Under ``fully_shard`` each process has statistics of its own, and under DistributedDataParallel they differ
    by one update: call ``broadcast_ranges`` after folding or unfolding in the course of a training, or ranges of
    weights that are learned differ between processes from then on.

    Turn batch norms into nn.SyncBatchNorm before this. A forward hook of the layer sees the output of the norm. The
    layer reads parameters of the norm: FSDP must have both in one unit, and nn.DataParallel cannot copy them.

    Args:
        model: quantized, calibrated or not.
        example_inputs: one batch, as for ``quantize``.

    Returns:
        The pairs, those of earlier calls included, and why other batch norms stay.

    Raises:
        InvalidTypeError: a batch of another kind; model is no nn.Module.
        InvalidValueError: one of an earlier pair was replaced in the model; a batch norm, or the weight in front of
            it, is not finite, with its name. Nothing is folded.

    >>> import fakequant, torch
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    >>> _ = fakequant.quantize(model)
    >>> print(fold_batchnorm(model, torch.rand(2, 3, 8, 8)))
    1 of 2 batch norms folded
      3: its input is not the output of a convolution or linear layer
    """
    check_module(model)
    args, kwargs = (example_inputs, {}) if isinstance(example_inputs, tuple) else model_arguments(example_inputs)
    folded_pairs(model)
    with _without_call_sites(model):
        graph = record(model, args, kwargs)
    search = _Search(model, graph)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, FoldedNorm)
    }
    found = {name: search.layer_of(name, norm) for name, norm in norms.items()}
    pairs = {name: layer for name, layer in found.items() if isinstance(layer, QuantProduct)}
    for name, layer in pairs.items():
        _check_finite(name, layer, norms[name])
    for name, layer in pairs.items():
        fold(layer, norms[name])
    return FoldReport(folded_pairs(model), {name: why for name, why in found.items() if isinstance(why, str)})


def unfold_batchnorm(model: _Model) -> _Model:
    """Undo ``fold_batchnorm``, in place, and return the model. Norms that are frozen stay frozen.

    Without quantizers the model computes what it would if it had never been folded, bit for bit. Calibrated ranges
    of weights go back with the weights, up to rounding. ``dequantize`` does this, too.

    Raises:
        InvalidTypeError: model is no nn.Module.
    """
    check_module(model)
    for module in model.modules():
        unfold(module)
    return model


def _check_finite(name: str, layer: QuantProduct, norm: _BatchNorm) -> None:
    """Check what the weight is multiplied by, before anything is folded: its range could not follow."""
    weights = {"weight of the layer in front of it": layer.weight, **norm.state_dict()}
    for key, value in weights.items():
        if not is_sharded(value) and not bool(value.isfinite().all()):
            raise InvalidValueError(f"{name}: expected finite values, got NaN or Inf in its {key}")
    assert norm.running_var is not None
    if bool((norm.running_var < 0).any()):
        raise InvalidValueError(f"{name}: expected a running_var of at least 0, got {float(norm.running_var.min())}")


@contextlib.contextmanager
def _without_call_sites(model: nn.Module) -> Iterator[None]:
    """Take the quantizers of functional calls out of a model for a with block."""
    owners = [(module, module._modules[CALL_SITES]) for module in model.modules() if is_owner(module)]
    for owner, _ in owners:
        del owner._modules[CALL_SITES]
    try:
        yield
    finally:
        for owner, sites in owners:
            owner._modules[CALL_SITES] = sites


class _Search:
    """Which layer is in front of which batch norm."""

    def __init__(self, model: nn.Module, graph: TensorGraph) -> None:
        self._modules = dict(model.named_modules())
        self._graph = graph
        self._owners = Counter(
            child
            for module in self._modules.values()
            for child in module._modules.values()
            if isinstance(child, TensorQuantizer)
        )

    def layer_of(self, name: str, norm: _BatchNorm) -> QuantProduct | str:
        """Return the layer that a batch norm can be folded into, or why there is none."""
        if isinstance(norm, QuantInputMixin):
            return "its input is quantized"
        if type(norm) not in FOLDED:
            return f"{type(norm).__name__} is no class of torch, and may have its own forward"
        if norm.running_var is None:
            return "it has no running statistics"
        calls = [call for call in self._graph.calls if (call.module, call.kind) == (name, "batch_norm")]
        if len(calls) != 1:
            return f"it is called {len(calls)} times in the example forward"
        value = calls[0].operand(0)
        producer = None if value is None else value.producer
        if producer is None or producer.role is not Role.WEIGHTED:
            return "its input is not the output of a convolution or linear layer"
        return self._why_not(producer) or self._modules[producer.module]

    def _why_not(self, call: Call) -> str:
        """Return why nothing can be folded into the layer that makes a call, "" if a batch norm can."""
        name, layer = call.name, self._modules[call.module]
        if not call.is_module:
            return f"{name} is a function, which has no class to change"
        if type(layer) not in FOLDED_LAYERS:
            return f"{name} ({type_name_of(layer)}) is not quantized, or is of a class of its own"
        if sole_use(call.output) is None:
            return f"the output of {name} has another reader"
        if len(self._graph.named(name)) != 1:
            return f"{name} is called {len(self._graph.named(name))} times in the example forward"
        if len(call.output.shape) != layer.weight.ndim:
            return f"the channels of {name} are not on axis 1 of its output of shape {call.output.shape}"
        quantizer = layer.weight_quantizer
        if self._owners[quantizer] != 1:
            return f"the range of the weight of {name} is shared with another layer"
        if quantizer.descriptor.scheme != UNIFORM or quantizer.descriptor.amax is not None:
            return f"the weight of {name} has a fixed range, or none: {quantizer.descriptor}"
        return ""
