"""From a plan to quantizers: every slot gets its own, or the one that it shares."""

from collections import defaultdict
from collections.abc import Hashable, Mapping

from torch import nn

from fakequant.call_sites import KIND_OF, CallSite, CallSites, PerCall, TensorGraph, hide, intercept, is_owner
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import UNIFORM
from fakequant.errors import RecipeError
from fakequant.nn import QuantInputMixin, TensorQuantizer, quantized_class_of
from fakequant.nn.modules.quant_module import quantizer_name
from fakequant.nn.modules.recurrent import QuantLSTM
from fakequant.placement import takes_unsigned, targets
from fakequant.plan import Plan, Slot
from fakequant.retarget import QUANTIZED_FOR, retarget


def install(model: nn.Module, plan: Plan) -> None:
    """Put the quantizers of a plan into the model that it was made for, in place."""
    _Installation(model, plan).run()


class _Installation:
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._modules = dict(model.named_modules())
        self._plan = plan
        self._quantizers: dict[tuple[Hashable, frozenset[QuantDescriptor]], TensorQuantizer] = {}
        self._has_per_call = False

    def run(self) -> None:
        modules: defaultdict[str, list[Slot]] = defaultdict(list)
        sites: defaultdict[str, dict[str, list[Slot]]] = defaultdict(dict)
        for slot in self._plan.slots:
            if slot.call.is_module:
                modules[slot.call.module].append(slot)
            else:
                sites[slot.call.module].setdefault(slot.call.site, []).append(slot)
        for name, slots in modules.items():
            self._convert(self._modules[name], slots)
        for name, calls in sites.items():
            if name:
                self._own(name, calls)
        self._own("", sites.get("", {}))
        for name, module in self._modules.items():
            if is_owner(module):
                self._hide_callees(name, module)
        retarget(self._modules[""], self._plan.target)

    def _quantizer(self, slot: Slot) -> TensorQuantizer | PerCall:
        found = []
        grids = frozenset(slot.grids.values())
        for key in slot.keys:
            if (key, grids) not in self._quantizers:
                self._quantizers[key, grids] = self._new(key, slot.grids)
                self._quantizers[key, grids].is_weight = slot.first.is_weight
            found.append(self._quantizers[key, grids])
        if len(set(found)) == 1:
            return found[0]
        self._has_per_call = True
        return PerCall(slot.name, found)

    def _new(self, key: Hashable, grids: Mapping[str, QuantDescriptor]) -> TensorQuantizer:
        any_grid = next(iter(grids.values()))
        quantizer = TensorQuantizer(grids.get(self._plan.target, any_grid))
        for target in targets():
            grid = grids.get(target, any_grid)
            from_zero = takes_unsigned(target) and key in self._plan.from_zero and _may_be_unsigned(grid)
            quantizer.grids[target] = grid.replace(unsigned=True) if from_zero else grid
        return quantizer

    def _convert(self, module: nn.Module, slots: list[Slot]) -> None:
        wanted = _targets_of_layer(slots)
        if not isinstance(module, QuantInputMixin):
            if not wanted:
                return
            quantized_class = quantized_class_of(type(module))
            assert quantized_class is not None
            module.__class__ = quantized_class
            assert isinstance(module, QuantInputMixin)
            module.init_quantizer()
        for slot in slots:
            child = quantizer_name(slot.first.operand_name)
            if slot.grids:
                module._modules[child] = self._quantizer(slot)
            else:
                module._modules[child].disable()  # type: ignore[union-attr, operator]
            if isinstance(module, QuantLSTM) and slot.first.operand_name == "input" and slot.grids:
                module.set_hidden_quantizer(self._new(("hidden", slot.call.name), slot.grids))
        if wanted and wanted != frozenset(targets()):
            setattr(module, QUANTIZED_FOR, wanted)

    def _own(self, name: str, calls: dict[str, list[Slot]]) -> None:
        installed = []
        for site_name, slots in calls.items():
            quantized = [slot for slot in slots if slot.grids]
            if not quantized:
                continue
            site = CallSite(slots[0].call.kind, [slot.first.operand_name for slot in quantized if slot.first.is_weight])
            for slot in quantized:
                site.add_module(slot.first.operand_name, self._quantizer(slot))
                site.targets[slot.first.operand_name] = frozenset(slot.grids)
            installed.append((site_name, site))
        # Calls are counted from the beginning of the model's forward; the model itself comes last.
        counts_calls = self._has_per_call and not name
        if installed or counts_calls:
            sites = CallSites(name, _seen(self._plan.graph, name), counts_calls)
            for site_name, site in installed:
                sites.add(site_name, site)
            intercept(self._modules[name], sites)

    def _hide_callees(self, name: str, owner: nn.Module) -> None:
        """Hide what an owner calls, by the example and by its own children: in training it may call others.

        Of a container it may call one child after another, as ``checkpoint_sequential`` does.
        """
        pending = [*(self._modules[callee] for callee in self._plan.graph.callees.get(name, ())), *owner.children()]
        while pending:
            child = pending.pop()
            if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                pending.extend(child.children())
            if not isinstance(child, nn.ModuleList | nn.ModuleDict | CallSites | TensorQuantizer | PerCall):
                hide(child)


def _may_be_unsigned(grid: QuantDescriptor) -> bool:
    """Whether levels from 0 are a gain: not where a zero point, a float or a paper's formula has its own way."""
    return not (grid.is_float or grid.learn_amax or grid.affine) and grid.scheme == UNIFORM


def _targets_of_layer(slots: list[Slot]) -> frozenset[str]:
    """Return the targets that want a layer quantized."""
    wanted = {slot.first.operand_name: frozenset(slot.grids) for slot in slots if slot.grids}
    if len(set(wanted.values())) > 1:
        found = ", ".join(f"{name} for {' and '.join(sorted(targets))}" for name, targets in wanted.items())
        raise RecipeError(
            f"{slots[0].call.name}: expected rules that leave the layer as a whole float for a target, got {found}"
        )
    return next(iter(wanted.values()), frozenset())


def _seen(graph: TensorGraph, name: str) -> dict[str, int]:
    """Return how many calls of each kind a module's forward made, the most of its visits."""
    seen = dict.fromkeys(KIND_OF.values(), 0)
    for call in graph.calls:
        if call.module == name and not call.is_module and call.kind in seen:
            seen[call.kind] = max(seen[call.kind], call.occurrence + 1)
    return seen
