"""The manifest of a quantized model: JSON from which a float model, built by the same code, becomes the same again.

::

    {"version": 1,
     "modules": {"conv": {"class": "Conv2d", "form": "QuantConv2d",
                          "quantizers": {"_input_quantizer": 0, "_weight_quantizer": 1}}, ...},
     "aliases": {"head_again": "head"},
     "folded": {"conv": "bn"},
     "quantizers": [{"grid": {"num_bits": 8}}, {"grid": {"num_bits": 8, "axis": 0, "narrow_range": true}}]}
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fakequant.call_sites import CallSites, PerCall
from fakequant.checkpoint.fields import Fields
from fakequant.checkpoint.modules import SavedModule, module_as_json, module_from_json
from fakequant.checkpoint.quantizers import quantizer_as_json, quantizer_from_json
from fakequant.errors import CheckpointError
from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.folded_layers import folded_pairs
from fakequant.nn.walk import named_quantizers
from fakequant.nn.wrappers import check_is_bare

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest whose quantizers are made, for one model.

    Args:
        modules: by full name, in order.
        aliases: {another full name of a module: its first one}.
        folded: {name of a layer: name of the batch norm that is folded into it}.
    """

    modules: Mapping[str, SavedModule]
    aliases: Mapping[str, str]
    folded: Mapping[str, str]


def manifest_of(model: nn.Module) -> dict[str, Any]:
    """Return what makes ``quantize_like`` give a float model the quantizers of this one: JSON, without ranges.

    For trainers that write checkpoints of their own: keep it beside ``model.state_dict()``, which has the ranges.
    ``save_quantized`` writes a file with both. Hooks are not in it, such as those of ``quantize_gradients``.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model, such as DistributedDataParallel.
        CheckpointError: a model without quantizers; a quantizer of a user's own class.
        InvalidValueError: a layer or a batch norm that were folded into each other, one of which was replaced.

    >>> from fakequant import quantize
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> _ = quantize(model)
    >>> manifest_of(model)["modules"]["0"]["form"]
    'QuantLinear'
    """
    check_is_bare(model)
    number_of: dict[TensorQuantizer, int] = {}
    quantizers: list[dict[str, Any]] = []
    for name, quantizer in named_quantizers(model):
        number_of[quantizer] = len(quantizers)
        quantizers.append(quantizer_as_json(quantizer, name))
    if not quantizers:
        raise CheckpointError(f"model: expected a quantized model, got {type(model).__name__} without quantizers")
    modules, aliases = own_modules(model)
    return {
        "version": VERSION,
        "modules": {name: module_as_json(module, number_of) for name, module in modules.items()},
        "aliases": aliases,
        "folded": folded_pairs(model),
        "quantizers": quantizers,
    }


def read_manifest(value: object) -> Manifest:
    """Check a manifest, which may come from anywhere, and make its quantizers and call sites.

    Raises:
        CheckpointError: not what ``manifest_of`` returns; says where.
    """
    with Fields(value, "manifest") as fields:
        version = fields.take("version", int)
        if version != VERSION:
            raise CheckpointError(f"manifest: version: expected {VERSION}, got {version}; another fakequant wrote it")
        quantizers = [
            quantizer_from_json(stored, f"quantizer {number}")
            for number, stored in enumerate(fields.take("quantizers", list))
        ]
        modules = {
            name: module_from_json(stored, name or "model", quantizers)
            for name, stored in fields.take_mapping("modules").items()
        }
        folded = fields.take_mapping("folded")
        if wrong := [pair for pair in folded.items() if not all(isinstance(of, str) and of in modules for of in pair)]:
            raise CheckpointError(f"folded: expected the names of two modules, got {wrong[:5]}")
        return Manifest(modules, fields.take_mapping("aliases"), folded)


def own_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return {full name: module} of all but what quantization added, and {another name of one: its first name}."""
    first: dict[nn.Module, str] = {}
    aliases = {}
    for name, module in _walk("", model):
        if first.setdefault(module, name) != name:
            aliases[name] = first[module]
    return {name: module for module, name in first.items()}, aliases


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None and not isinstance(child, CallSites | PerCall | TensorQuantizer):
            yield from _walk(f"{name}.{child_name}".lstrip("."), child)
