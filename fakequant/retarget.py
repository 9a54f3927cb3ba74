"""One placed model, several targets: which of its quantizers are in use, on which grids."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from fakequant.call_sites import CallSite, PerCall
from fakequant.descriptor import QuantDescriptor
from fakequant.nn import QuantInputMixin, TensorQuantizer, quantized_class_of
from fakequant.nn.registry import is_given
from fakequant.targets import placement_of

QUANTIZED_FOR = "_quantized_for"
"""Attribute of a layer that some targets leave float: the others."""


def retarget(model: nn.Module, target: str) -> None:
    """Quantize for another target from now on, in place; ranges stay.

    ``export_onnx`` and ``validate_onnx`` do this by themselves, and undo it. Call it to train for a
    target, or to look at what it will compute. A model without placement stays as it is. Targets of
    one placement (see ``fakequant.targets``) compute the same.

    Raises:
        InvalidValueError: unknown target.
    """
    placement = placement_of(target)
    _switch(model, lambda targets: placement in targets)
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and placement in module.grids:
            _regrid(module, module.grids[placement])


@contextlib.contextmanager
def targeted(model: nn.Module, target: str) -> Iterator[None]:
    """Retarget for a with block."""
    with _restored(model):
        retarget(model, target)
        yield


@contextlib.contextmanager
def every_target(model: nn.Module) -> Iterator[None]:
    """Put the quantizers of all targets into use for a with block, so that one calibration serves them."""
    with _restored(model):
        _switch(model, lambda targets: True)
        yield


def _switch(model: nn.Module, is_wanted: Callable[[frozenset[str]], bool]) -> None:
    used: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, CallSite):
            module.stand_by = frozenset(name for name, targets in module.targets.items() if not is_wanted(targets))
            used.update(module.in_use)
        targets = vars(module).get(QUANTIZED_FOR)
        is_quantized = targets is None or is_wanted(targets)
        if targets is not None:
            _make_layer(module, is_quantized)
        if isinstance(module, QuantInputMixin) and is_quantized:
            used.update(child for child in module.children() if isinstance(child, TensorQuantizer | PerCall))
    used |= {quantizer for module in used if isinstance(module, PerCall) for quantizer in module.children()}
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.grids:
            module.set_stands_by(module not in used)


def _make_layer(module: nn.Module, quantized: bool) -> None:
    """Give a layer its quantized or its float class; its quantizers stay with it, and stand by in a float one."""
    if quantized and not isinstance(module, QuantInputMixin):
        cls = quantized_class_of(type(module))
        assert cls is not None
        module.__class__ = cls
    elif not quantized and isinstance(module, QuantInputMixin) and is_given(type(module)):
        module.__class__ = type(module).float_class  # type: ignore[assignment]


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    sites = [(site, site.stand_by) for site in modules if isinstance(site, CallSite)]
    layers = [(module, type(module)) for module in modules if QUANTIZED_FOR in vars(module)]
    quantizers = [(q, q.stands_by, q.descriptor) for q in modules if isinstance(q, TensorQuantizer) and q.grids]
    try:
        yield
    finally:
        for site, stand_by in sites:
            site.stand_by = stand_by
        for module, cls in layers:
            module.__class__ = cls
        for quantizer, stands_by, descriptor in quantizers:
            quantizer.set_stands_by(stands_by)
            _regrid(quantizer, descriptor)


def _regrid(quantizer: TensorQuantizer, grid: QuantDescriptor) -> None:
    if quantizer.descriptor != grid:
        quantizer.descriptor = grid
