"""The quantizers of functional calls: a call's, a module's, and those of a slot with one for each call."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fakequant.call_sites.ops import IN_PLACE, op_named, operands, with_operand
from fakequant.call_sites.running import Interception, running_interception
from fakequant.errors import InvalidValueError
from fakequant.fake_quantize import recompute_quantized
from fakequant.nn import TensorQuantizer
from fakequant.nn.functional import attention
from fakequant.nn.modes import is_repeated


class CallSite(nn.Module):
    """The quantizers of one functional call, children under the names of its operands.

    Args:
        kind: of the op.
        weights: names of the operands that are weights.
    """

    def __init__(self, kind: str, weights: Iterable[str] = ()) -> None:
        super().__init__()
        self.kind = kind
        self.weights = tuple(weights)
        self.targets: dict[str, frozenset[str]] = {}
        """Operand -> the targets that want it quantized."""
        self.stand_by: frozenset[str] = frozenset()
        """The operands that the present target does not want quantized."""

    @property
    def weight_quantizers(self) -> list[TensorQuantizer]:
        """The quantizers of the weights."""
        return [self._modules[name] for name in self.weights]  # type: ignore[misc]

    def forward(
        self, running: Interception, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function on quantized operands."""
        with recompute_quantized():
            return self._call(running, function, args, kwargs)

    def _call(
        self, running: Interception, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.kind == "scaled_dot_product_attention":
            return self._attention(running, function, *args, **kwargs)
        op = op_named(self.kind)
        assert op is not None
        written: Any = args[0] if function in IN_PLACE else None
        for index, operand in enumerate(operands(op, args, kwargs)):
            quantizer = self._quantizer(op.operand_name(index), running)
            if quantizer is not None and isinstance(operand, Tensor):
                # What the quantizer keeps for its backward must not be written to.
                quantized = quantizer(operand.clone() if operand is written else operand)
                args, kwargs = with_operand(op, args, kwargs, index, quantized)
        if written is not None and args[0] is not written:
            return written.copy_(function(*args, **kwargs))
        return function(*args, **kwargs)

    def _attention(self, running: Interception, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        quantizers = {name: self._quantizer(name, running) for name in ("query", "key", "value", "softmax")}
        if not any(quantizer is not None and quantizer.is_active for quantizer in quantizers.values()):
            return function(*args, **kwargs)
        chosen: dict[str, Any] = {f"{name}_quantizer": quantizer or _identity for name, quantizer in quantizers.items()}
        return attention(*args, **{**kwargs, **chosen})

    @property
    def in_use(self) -> "list[TensorQuantizer | PerCall]":
        """The quantizers of the operands that the present target wants quantized."""
        return [q for operand, q in self._modules.items() if operand not in self.stand_by]  # type: ignore[misc]

    def _quantizer(self, operand: str, running: Interception) -> TensorQuantizer | None:
        if operand in self.stand_by:
            return None
        quantizer = self._modules.get(operand)
        return quantizer.of_call(running) if isinstance(quantizer, PerCall) else quantizer  # type: ignore[return-value]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class CallSites(nn.Module):
    """The call sites of one module: children ``add_0``, ``cat_1``, ... by op and occurrence.

    Args:
        owner: full name of the module.
        seen: how many calls of each kind the example forward made.
        counts_calls: whether a PerCall inside the module counts from the beginning of its forward.
    """

    def __init__(self, owner: str, seen: dict[str, int], counts_calls: bool = False) -> None:
        super().__init__()
        self.owner = owner
        self.seen = seen
        self.counts_calls = counts_calls
        self.kinds: frozenset[str] = frozenset()
        self.reported: set[str] = set()

    def add(self, name: str, site: CallSite) -> None:
        """Add a site."""
        self.add_module(name, site)
        self.kinds = self.kinds | {site.kind}

    def site(self, kind: str, occurrence: int) -> CallSite | None:
        """Return the site of a call; report a call that the example did not make."""
        name = f"{kind}_{occurrence}"
        found = self._modules.get(name)
        if found is None and occurrence >= self.seen[kind] and not torch.compiler.is_compiling():
            self._report(name, self.call_name(kind, occurrence))
        return found  # type: ignore[return-value]

    def call_name(self, kind: str, occurrence: int) -> str:
        """Return the full name of a call."""
        return f"{self.owner}.{kind}_{occurrence}".lstrip(".")

    @property
    def is_idle(self) -> bool:
        """Whether a forward would be the same without it: no quantizer is active, nothing is counted."""
        if self.counts_calls:
            return False
        return not any(quantizer.is_active for site in self._modules.values() for quantizer in site.in_use)  # type: ignore[union-attr]

    def _report(self, name: str, call: str) -> None:
        if name in self.reported:
            return
        self.reported.add(name)
        warnings.warn(
            f"call {call} was not made in the example forward and stays float. "
            "Quantize with an example that takes this way, if it matters",
            stacklevel=2,
        )


class PerCall(nn.Module):
    """A quantizer for each call of one slot within one forward of the model, children ``0``, ``1``, ...

    Args:
        slot: full name of the operand, which no other PerCall of the model has.
        quantizers: one a call; the last also serves calls beyond.
    """

    def __init__(self, slot: str, quantizers: list[TensorQuantizer]) -> None:
        super().__init__()
        self.slot = slot
        for index, quantizer in enumerate(quantizers):
            self.add_module(str(index), quantizer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Quantize with the quantizer of this call."""
        quantized: Tensor = self.of_call(running_interception())(inputs)
        return quantized

    @property
    def is_active(self) -> bool:
        """Whether a call may quantize or collect."""
        return any(quantizer.is_active for quantizer in self._modules.values())  # type: ignore[union-attr]

    def of_call(self, running: Interception | None) -> TensorQuantizer:
        """Return the quantizer of this call, and count the call.

        Raises:
            InvalidValueError: a second forward in the backward pass, which does not tell which call it repeats.
        """
        if (running is None or not running.counts_calls) and is_repeated():
            raise InvalidValueError(
                f"{self.slot}: expected gradient checkpointing of the whole model or of modules that it calls once, "
                f"got a checkpoint of a module with a quantizer for each of its {len(self._modules)} calls"
            )
        number = 0 if running is None else running.next_call(self.slot)
        return self._modules[str(min(number, len(self._modules) - 1))]  # type: ignore[return-value]
