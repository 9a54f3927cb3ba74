"""Quantized models by patching torch.nn before construction, as the field knows it.

``initialize()`` puts quantized classes in the place of ``torch.nn.Conv2d`` and others;
models built afterwards are quantized; ``deactivate()`` puts torch's classes back.
``patched_torch_nn()`` is the same as a context manager. A name that was imported
earlier (``from torch.nn import Linear``) and layers inside torch's own modules are out
of reach of patching: ``fakequant.quantize`` converts an existing model and reports them.
Recurrent layers are patched like their cells, though presets leave them float: who patches asks for
quantized ones, and their files are as fast as the float layer's (see ``fakequant.nn.modules.recurrent``).
Classes that are not quantized by default (a max pool commutes with quantization, norms
and activations stay float inside) are not patched; custom_quant_modules adds them.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import registered
from fakequant.nn.registry import is_by_default

CustomModule: TypeAlias = tuple[Any, str, type[nn.Module]]
"""(object to patch, attribute name, class to put there)"""

# What initialize() replaced: (object, name) -> the original. Empty when nothing is patched.
_replaced: dict[tuple[Any, str], Any] = {}


def initialize(
    float_module_list: Iterable[str] | None = None, custom_quant_modules: Iterable[CustomModule] | None = None
) -> None:
    """Patch torch.nn; models built from now on are quantized. A second call starts over from the original torch.nn.

    Args:
        float_module_list: names left alone, such as ``["Linear"]``.
        custom_quant_modules: ``(object, "Name", class)`` to patch besides; also under a name of float_module_list.

    Raises:
        InvalidValueError: a name in float_module_list that no layer of torch.nn with a quantized class has, or
            an object lacks the attribute.
        InvalidTypeError: an entry of custom_quant_modules is not such a triple.
    """
    plan = _plan(float_module_list, custom_quant_modules)
    deactivate()
    try:
        for (target, name), replacement in plan.items():
            original = getattr(target, name)
            setattr(target, name, replacement)
            _replaced[target, name] = original
    except Exception:
        deactivate()
        raise


def deactivate() -> None:
    """Undo ``initialize``, however often it was called; harmless without it."""
    while _replaced:
        (target, name), original = _replaced.popitem()
        setattr(target, name, original)


@contextlib.contextmanager
def patched_torch_nn(
    float_module_list: Iterable[str] | None = None, custom_quant_modules: Iterable[CustomModule] | None = None
) -> Iterator[None]:
    """Patch torch.nn inside a with block; afterwards everything is as it was before, also when nested or on errors.

    Arguments and errors as in ``initialize``.

    >>> import torch
    >>> with patched_torch_nn():
    ...     layer = torch.nn.Linear(2, 2)
    >>> type(layer).__name__, torch.nn.Linear.__name__
    ('QuantLinear', 'Linear')
    """
    outer = {key: getattr(*key) for key in _replaced}
    outer_originals = dict(_replaced)
    try:
        initialize(float_module_list, custom_quant_modules)
        yield
    finally:
        deactivate()
        _replaced.update(outer_originals)
        for (target, name), value in outer.items():
            setattr(target, name, value)


@contextlib.contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Do nothing: every ``torch.onnx.export`` gives standard Q/DQ. Kept so that scripts for the ancestor run."""
    yield


def _in_torch_nn(name: str) -> Any:
    """Return what torch.nn itself has under a name, patched or not; None if nothing."""
    return _replaced.get((nn, name), getattr(nn, name, None))


def _plan(
    float_module_list: Iterable[str] | None, custom_quant_modules: Iterable[CustomModule] | None
) -> dict[tuple[Any, str], type[nn.Module]]:
    """Check everything and return what goes where, before anything is patched."""
    of_torch = {
        float_class.__name__: (float_class, quantized)
        for float_class, quantized in registered()
        if _in_torch_nn(float_class.__name__) is float_class
    }
    patched = {name: quantized for name, (float_class, quantized) in of_torch.items() if is_by_default(float_class)}
    left_float = set(float_module_list or ())
    if unknown := sorted(left_float - set(of_torch)):
        raise InvalidValueError(f"float_module_list: expected names among {sorted(of_torch)}, got {unknown}")
    plan: dict[tuple[Any, str], type[nn.Module]] = {
        (nn, name): quantized for name, quantized in patched.items() if name not in left_float
    }
    for entry in custom_quant_modules or ():
        if not (isinstance(entry, tuple | list) and len(entry) == 3 and isinstance(entry[1], str)):
            raise InvalidTypeError(f"custom_quant_modules: expected (object, name, class) triples, got {entry!r}")
        target, name, replacement = entry
        if not hasattr(target, name):
            raise InvalidValueError(f"custom_quant_modules: expected an attribute {name!r} of {target!r}, got none")
        plan[target, name] = replacement
    return plan
