"""One module as JSON: its class, its quantizers, its call sites. Quantizers go by their number in the manifest."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from fakequant.call_sites import KIND_OF, CallSite, CallSites, Op, PerCall, is_hidden, is_owner, op_named, own_class
from fakequant.call_sites.containers import CALL_SITES
from fakequant.checkpoint.fields import Fields, as_type
from fakequant.errors import CheckpointError
from fakequant.nn import TensorQuantizer, quantized_class_of
from fakequant.nn.forms import plain_class_of
from fakequant.nn.modules.folded_layers import UNFOLDED
from fakequant.retarget import QUANTIZED_FOR
from fakequant.targets import placement_names

Quantizer: TypeAlias = TensorQuantizer | PerCall


@dataclasses.dataclass(frozen=True)
class SavedModule:
    """What a manifest says of one module.

    Args:
        class_name: of its plain class.
        form: name of the class that it has in place of the plain one, "" for none.
        quantizers: {name of the child: quantizer}.
        targets: that want it quantized, of a layer that others leave float.
        is_float: whether the present target is one of the others.
        is_hidden: whether its calls are hidden from the owner of call sites that calls it.
        sites: its call sites, None for no owner.
    """

    class_name: str
    form: str
    quantizers: Mapping[str, Quantizer]
    targets: frozenset[str]
    is_float: bool
    is_hidden: bool
    sites: CallSites | None


def module_as_json(module: nn.Module, number_of: Mapping[TensorQuantizer, int]) -> dict[str, Any]:
    """Return a module as JSON."""
    cls = own_class(module)
    cls = UNFOLDED.get(cls, cls)  # which is folded into which, the manifest says
    plain = plain_class_of(cls)
    targets = vars(module).get(QUANTIZED_FOR)
    quantized = quantized_class_of(cls) if targets else None  # the present target leaves the layer float
    form = quantized or (None if cls is plain else cls)
    fields: dict[str, Any] = {"class": plain.__name__}
    if form is not None:
        fields["form"] = form.__name__
    if targets:
        fields |= {"targets": sorted(targets), "is_float": quantized is not None}
    if quantizers := _slots_as_json(module, number_of):
        fields["quantizers"] = quantizers
    if is_hidden(module):
        fields["is_hidden"] = True
    if is_owner(module):
        fields["sites"] = _sites_as_json(module._modules[CALL_SITES], number_of)  # type: ignore[arg-type]
    return fields


def module_from_json(value: object, where: str, quantizers: Sequence[TensorQuantizer]) -> SavedModule:
    """Return what ``module_as_json`` wrote.

    Raises:
        CheckpointError: not what it writes; an op that is not registered here.
    """
    with Fields(value, where) as fields:
        return SavedModule(
            class_name=fields.take("class", str),
            form=fields.take("form", str, ""),
            quantizers=_slots_from_json(fields.take_mapping("quantizers"), where, quantizers),
            targets=frozenset(fields.take_names("targets", placement_names())),
            is_float=fields.take("is_float", bool, False),
            is_hidden=fields.take("is_hidden", bool, False),
            sites=_sites_from_json(fields.take("sites", dict), where, quantizers) if "sites" in fields else None,
        )


def _slots_as_json(module: nn.Module, number_of: Mapping[TensorQuantizer, int]) -> dict[str, Any]:
    slots: dict[str, Any] = {}
    for name, child in module._modules.items():
        if isinstance(child, TensorQuantizer):
            slots[name] = number_of[child]
        elif isinstance(child, PerCall):
            slots[name] = {"slot": child.slot, "calls": [number_of[q] for q in child._modules.values()]}  # type: ignore[index]
    return slots


def _slots_from_json(
    slots: Mapping[str, Any], where: str, quantizers: Sequence[TensorQuantizer]
) -> dict[str, Quantizer]:
    def numbered(value: object, of: str) -> TensorQuantizer:
        number = as_type(value, int, of)
        if not 0 <= number < len(quantizers):
            raise CheckpointError(f"{of}: expected the number of one of {len(quantizers)} quantizers, got {number}")
        return quantizers[number]

    found: dict[str, Quantizer] = {}
    for name, value in slots.items():
        of = f"{where}: {name}"
        if isinstance(value, Mapping):
            with Fields(value, of) as fields:
                calls = [numbered(call, f"{of}: calls") for call in fields.take("calls", list)]
                if not calls:
                    raise CheckpointError(f"{of}: calls: expected a quantizer for each call, got none")
                found[name] = PerCall(fields.take("slot", str), calls)
        else:
            found[name] = numbered(value, of)
    return found


def _sites_as_json(sites: CallSites, number_of: Mapping[TensorQuantizer, int]) -> dict[str, Any]:
    fields: dict[str, Any] = {"owner": sites.owner, "seen": {kind: n for kind, n in sites.seen.items() if n}}
    if sites.counts_calls:
        fields["counts_calls"] = True
    fields["calls"] = {name: _site_as_json(site, number_of) for name, site in sites._modules.items()}  # type: ignore[arg-type]
    return fields


def _sites_from_json(value: object, where: str, quantizers: Sequence[TensorQuantizer]) -> CallSites:
    with Fields(value, f"{where}: sites") as fields:
        seen = {kind: as_type(n, int, f"{where}: seen {kind}") for kind, n in fields.take_mapping("seen").items()}
        sites = CallSites(
            fields.take("owner", str),
            {**dict.fromkeys(KIND_OF.values(), 0), **seen},
            fields.take("counts_calls", bool, False),
        )
        for name, site in fields.take_mapping("calls").items():
            sites.add(name, _site_from_json(name, site, f"{where}: {name}", quantizers))
    return sites


def _site_as_json(site: CallSite, number_of: Mapping[TensorQuantizer, int]) -> dict[str, Any]:
    return {
        "kind": site.kind,
        "weights": list(site.weights),
        "targets": {operand: sorted(targets) for operand, targets in site.targets.items()},
        "stand_by": sorted(site.stand_by),
        "quantizers": _slots_as_json(site, number_of),
    }


def _site_from_json(name: str, value: object, where: str, quantizers: Sequence[TensorQuantizer]) -> CallSite:
    with Fields(value, where) as fields:
        kind = fields.take("kind", str)
        op = op_named(kind)
        if op is None or kind not in KIND_OF.values():
            raise CheckpointError(f"{where}: expected a known op, got {kind!r}; call register_op before loading")
        if not (name.startswith(f"{kind}_") and name[len(kind) + 1 :].isdecimal()):
            raise CheckpointError(f"{where}: expected the name {kind}_<number of the call>, got {name!r}")
        slots = _slots_from_json(fields.take_mapping("quantizers"), where, quantizers)
        if wrong := [operand for operand in slots if not _is_operand(op, operand)]:
            raise CheckpointError(f"{where}: expected operands of {kind}, got {wrong}")
        site = CallSite(kind, fields.take_names("weights", slots))
        site.stand_by = frozenset(fields.take_names("stand_by", slots))
        check_weights(where, {weight: slots[weight] for weight in site.weights})
        with Fields(fields.take_mapping("targets"), f"{where}: targets") as targets:
            site.targets = {operand: frozenset(targets.take_names(operand, placement_names())) for operand in slots}
        for operand, quantizer in slots.items():
            site.add_module(operand, quantizer)
    return site


def check_weights(where: str, quantizers: Mapping[str, nn.Module | None]) -> None:
    """Raise CheckpointError for a weight that has not one quantizer for all calls."""
    for name, quantizer in quantizers.items():
        if not isinstance(quantizer, TensorQuantizer):
            raise CheckpointError(
                f"{where}: {name}: expected one quantizer of a weight, got {type(quantizer).__name__}"
            )


def _is_operand(op: Op, name: str) -> bool:
    if op.takes_list:
        return name.startswith("tensors_") and name.removeprefix("tensors_").isdecimal()
    return name in (*op.operands, "softmax") if op.kind == "scaled_dot_product_attention" else name in op.operands
