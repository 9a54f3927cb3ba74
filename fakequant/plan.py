"""The plan: where each quantizer will stand, on which grid, shared with which others, and why."""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from fakequant.batches import model_arguments
from fakequant.call_sites import Call, Role, TensorGraph, record
from fakequant.conversion_report import ConversionReport, EdgeReport, LayerReport
from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.nn import QuantInputMixin, QuantMixin, registered, why_unreachable
from fakequant.placement import SOFTMAX, Decision, Groups, is_layer, layer_positions, place
from fakequant.recipe import Recipe, Rule, as_recipe


@dataclasses.dataclass(frozen=True)
class Slot:
    """One operand of one call site or module, over all its calls in one forward.

    Args:
        call: the first of them.
        operand: which operand.
        descriptor: the grid, None for float.
        reason: why there is a quantizer, or why not.
        keys: one a call; slots and calls with equal keys and grids share one quantizer.
        is_weight: the operand is a weight.
    """

    call: Call
    operand: int
    descriptor: QuantDescriptor | None
    reason: str
    keys: tuple[Hashable, ...]
    is_weight: bool

    @property
    def operand_name(self) -> str:
        """Name of the operand: "input", "other", "softmax"."""
        return "softmax" if self.operand == SOFTMAX else self.call.operand_name(self.operand)

    @property
    def name(self) -> str:
        """Full name: ``layer1.0.add_0.other``."""
        return f"{self.call.name}.{self.operand_name}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What quantization will do to a model; ``print`` it.

    Args:
        target: that the placement is for.
        slots: in order of execution.
        graph: of the example forward.
        report: the same for reading.
    """

    target: str
    slots: tuple[Slot, ...]
    graph: TensorGraph
    report: ConversionReport

    def __str__(self) -> str:
        """Return the report, then every edge with its reason."""
        return f"plan for {self.target}\n{self.report}\n{self.report.edge_table()}"


def plan(model: nn.Module, example_inputs: Any, target: str = "tensorrt", recipe: str | Recipe = "int8") -> Plan:
    """Return where quantizers go in a model, and why; the model is not changed. Costs one forward.

    Args:
        model: float.
        example_inputs: one batch: a tuple of arguments, a dict of keyword arguments, or a tensor.
        target: "tensorrt".
        recipe: a preset's name or a Recipe.

    Raises:
        InvalidTypeError: a recipe or batch of another kind.
        InvalidValueError: unknown target.
        RecipeError: unknown preset, or a rule that matches nothing.

    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    >>> import torch
    >>> print(plan(model, torch.rand(1, 16, 8, 8)).report)
    1 of 1 Conv2d quantized
    """
    chosen = as_recipe(recipe).for_target(target)
    graph = record(model, *_arguments(example_inputs))
    decisions = place(graph, target)
    modules = dict(model.named_modules())
    unreachable = {name: reason for name, module in modules.items() if (reason := why_unreachable(module))}
    types = _TypeNames(modules)
    positions = layer_positions(graph)
    chosen.check_matches({d.call.name: types.of(d.call) for d in decisions}, positions)
    groups = Groups(graph)
    by_slot: defaultdict[tuple[str, int], list[Decision]] = defaultdict(list)
    for decision in decisions:
        by_slot[decision.call.name, decision.operand].append(decision)
    rules = {
        d.call.name: chosen.decide(d.call.name, types.of(d.call), positions.get(d.call.name, ()))
        if is_layer(d.call)
        else chosen.decide_op(d.call.name, types.of(d.call))
        for d in decisions
    }
    slots = tuple(
        _slot(found, rules[found[0].call.name], types, groups, unreachable.get(found[0].call.module, ""))
        for found in by_slot.values()
    )
    return Plan(target, slots, graph, _report(model, slots, types))


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return model_arguments(example_inputs)


class _TypeNames:
    """Class names of layers, as rules and reports call them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def of(self, call: Call) -> str:
        """Return the float class of a module call; "Linear" for F.linear; the kind of any other op."""
        if not call.is_module:
            return next((cls.__name__ for cls, _ in registered() if _is_function_of(cls, call)), call.kind)
        module = self._modules[call.module]
        return type(module).float_class.__name__ if isinstance(module, QuantInputMixin) else type(module).__name__


def _is_function_of(cls: type[nn.Module], call: Call) -> bool:
    return call.role is Role.WEIGHTED and cls.__name__.lower() == call.kind.replace("_", "")


def _slot(calls: list[Decision], rule: Rule, types: _TypeNames, groups: Groups, unreachable: str) -> Slot:
    first = calls[0]
    grid = rule.weight if first.is_weight else rule.input
    refused = next((decision for decision in calls if not decision.quantized), None)
    if unreachable:
        descriptor, reason = None, unreachable
    elif grid is None:
        descriptor, reason = None, rule.why_float()
    elif refused is not None and not rule.force:
        descriptor, reason = None, refused.reason
    else:
        descriptor = grid if isinstance(grid, QuantDescriptor) else _default_grid(first, types)
        reason = first.reason if refused is None else f"rule {rule.name!r} asks for it"
        if first.amax is not None:
            descriptor = descriptor.replace(amax=first.amax)
    keys = tuple(_key(decision, groups) for decision in calls)
    return Slot(first.call, first.operand, descriptor, reason, keys, first.is_weight)


def _default_grid(decision: Decision, types: _TypeNames) -> QuantDescriptor:
    op = decision.call.op
    if op is not None and decision.is_weight and decision.operand_name in op.weights:
        axis = op.weights[decision.operand_name]
        return QUANT_DESC_8BIT_PER_TENSOR.replace(axis=axis, narrow_range=True)
    type_name = types.of(decision.call)
    found = next((cls for float_class, cls in registered() if float_class.__name__ == type_name), None)
    if not decision.is_weight:
        return QUANT_DESC_8BIT_PER_TENSOR if found is None else found.default_quant_desc_input
    if found is not None and issubclass(found, QuantMixin):
        return found.default_quant_desc_weight
    return QUANT_DESC_8BIT_PER_TENSOR.replace(axis=1, narrow_range=True)  # the columns of x @ weight


def _key(decision: Decision, groups: Groups) -> Hashable:
    value = decision.value
    if decision.is_weight and value is not None:
        return ("weight", value.parameter or decision.call.name)
    if value is None or decision.amax is not None:
        return ("fixed", decision.call.name, decision.operand)
    return ("value", value.index) if decision.own_range else ("group", groups.of(value).index)


def _report(model: nn.Module, slots: tuple[Slot, ...], types: _TypeNames) -> ConversionReport:
    layers: dict[str, LayerReport] = {}
    for slot in slots:
        if not is_layer(slot.call):
            continue
        name = slot.call.name
        layer = layers.get(name, LayerReport(name, types.of(slot.call), reason=slot.reason))
        if slot.descriptor is not None and slot.is_weight:
            layer = dataclasses.replace(layer, reason="", weight=slot.descriptor)
        elif slot.descriptor is not None:
            layer = dataclasses.replace(layer, reason="", input=slot.descriptor)
        layers[name] = layer
    weighted = tuple(float_class for float_class, cls in registered() if issubclass(cls, QuantMixin))
    called = {slot.call.module for slot in slots if slot.call.is_module}
    read = {value.parameter for slot in slots if is_layer(slot.call) and (value := slot.call.operand(1)) is not None}
    for name, module in model.named_modules():
        if isinstance(module, weighted) and name not in called and f"{name}.weight".lstrip(".") not in read:
            layers[name] = LayerReport(name, type(module).__name__, reason="was not called in the example forward")
    first: dict[Hashable, str] = {}
    edges = []
    for slot in slots:
        shared = {first.setdefault((key, slot.descriptor), slot.name) for key in slot.keys}
        with_ = tuple(sorted(shared - {slot.name})) if slot.descriptor is not None else ()
        edges.append(EdgeReport(slot.name, types.of(slot.call), slot.descriptor, slot.reason, with_, slot.is_weight))
    return ConversionReport(tuple(layers.values()), tuple(edges))
