"""The plan: where each quantizer will stand, on which grid, shared with which others, and why."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import Any

from torch import nn

from fakequant.batches import model_arguments
from fakequant.call_sites import Call, Role, TensorGraph, is_owner, record
from fakequant.conversion_report import ConversionReport, EdgeReport, LayerReport
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError, RecipeError
from fakequant.layers import Layers, type_name_of
from fakequant.nn import TensorQuantizer, checked_grid
from fakequant.nn.registry import is_on_request, is_seen_through, weighted
from fakequant.placement import (
    Decision,
    Groups,
    Override,
    is_layer,
    layer_positions,
    never_negative,
    place,
    targets,
)
from fakequant.presets import as_recipe
from fakequant.recipe import NOT_ASKED_FOR, Recipe, Rule
from fakequant.targets import placement_of

_OF_THE_RANGE = ("amax", "axis", "affine", "learn_amax", "block_size", "block_axis")
"""Fields of a grid that say what its range is."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """One operand of one call site or module, over all its calls in one forward.

    Args:
        first: the decision about the first of them.
        grids: of the targets that want a quantizer.
        reason: why the target of the plan wants one, or why not.
        keys: one a call; slots and calls with equal keys and grids share one quantizer.
    """

    first: Decision
    grids: Mapping[str, QuantDescriptor]
    reason: str
    keys: tuple[Hashable, ...]

    @property
    def call(self) -> Call:
        """The first call."""
        return self.first.call

    @property
    def name(self) -> str:
        """Full name: ``layer1.0.add_0.other``."""
        return self.first.name


@dataclasses.dataclass(frozen=True)
class Plan:
    """What quantization will do to a model; ``print`` it.

    Args:
        target: that the plan is for; of several with one placement, the one that it is named after.
        slots: in order of execution, also those that only other targets want.
        from_zero: keys of tensors that are never negative.
        graph: of the example forward.
        report: the same for reading.
    """

    target: str
    slots: tuple[Slot, ...]
    from_zero: frozenset[Hashable]
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
        target: "tensorrt", "tensorrt-ep", "onnxruntime-cuda" or "onnxruntime"; the first three have one placement.
        recipe: a preset's name or a Recipe.

    Raises:
        InvalidTypeError: a recipe or batch of another kind.
        InvalidValueError: unknown target; a model that has call sites or ranges already.
        RecipeError: unknown preset, or a rule that matches nothing.

    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    >>> import torch
    >>> print(plan(model, torch.rand(1, 16, 8, 8)).report)
    1 of 1 Conv2d quantized
    """
    target = placement_of(target)
    chosen = as_recipe(recipe)
    _check_is_new(model)
    asked = {
        name
        for name, module in model.named_modules()
        if is_on_request(type(module)) and not chosen.decide_on_request(name, type(module).__name__).is_float
    }
    graph = record(model, *_arguments(example_inputs), as_one_call=asked)
    layers, groups, positions = Layers(model), Groups(graph), layer_positions(graph)
    found: defaultdict[tuple[str, int], dict[str, _Placed]] = defaultdict(dict)
    for other in (target, *(name for name in targets() if name != target)):
        for where, placed in _placed(graph, other, chosen.for_target(other), layers, positions).items():
            found[where][other] = placed
    calls = {placed.decisions[0].call for by_target in found.values() for placed in by_target.values()}
    chosen.check_matches({call.name: layers.type_name(call) for call in calls}, positions)
    order = {call.name: index for index, call in reversed(list(enumerate(graph.calls)))}
    slots = tuple(
        _slot(found[where], target, groups) for where in sorted(found, key=lambda where: (order[where[0]], where[1]))
    )
    from_zero = frozenset(("group", value.index) for value in never_negative(graph, groups))
    return Plan(target, slots, from_zero, graph, _report(model, slots, target, layers))


@dataclasses.dataclass(frozen=True)
class _Placed:
    """What one target decides about one operand, over all calls."""

    decisions: list[Decision]
    grid: QuantDescriptor | None
    reason: str


def _placed(
    graph: TensorGraph,
    target: str,
    recipe: Recipe,
    layers: Layers,
    positions: Mapping[str, Collection[str]],
) -> dict[tuple[str, int], _Placed]:
    def rule_of(call: Call) -> Rule:
        name, type_name = call.name, layers.type_name(call)
        if layers.is_on_request(call):
            return recipe.decide_on_request(name, type_name)
        if not _has_weights(call):
            return recipe.decide_op(name, type_name)
        return recipe.decide(name, type_name, positions.get(name, ()))

    def override(call: Call, is_weight: bool) -> Override | None:
        return _override(call, is_weight, rule_of(call), layers)

    decisions = place(graph, target, override, on_layers_only=recipe.ops is None)
    by_operand: defaultdict[tuple[str, int], list[Decision]] = defaultdict(list)
    for decision in decisions:
        by_operand[decision.call.name, decision.operand].append(decision)
    return {where: _of_one_operand(calls, rule_of(calls[0].call), layers) for where, calls in by_operand.items()}


def _has_weights(call: Call) -> bool:
    """Whether a call is a layer, or a module of a user's own that has quantized weights."""
    return is_layer(call) or (call.is_module and call.op is not None and bool(call.op.weights))


def _check_is_new(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_owner(module):
            raise InvalidValueError(
                f"{name or 'model'}: expected a model without call sites, got one that was quantized with an example; "
                "dequantize it first"
            )
        if isinstance(module, TensorQuantizer) and module.amax is not None and module.descriptor.amax is None:
            raise InvalidValueError(
                f"{name}: expected a quantizer without a range, which placement may share with others, got one that "
                "was calibrated; quantize with an example before calibration, or dequantize first"
            )


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return model_arguments(example_inputs)


def _override(call: Call, is_weight: bool, rule: Rule, layers: Layers) -> Override | None:
    """Return what the model or a rule says about an operand whatever the placement would."""
    if reason := layers.why_unreachable(call):
        return Override(False, reason)
    if layers.is_disabled(call, is_weight):
        return Override(False, "its quantizer is disabled")
    if (rule.weight if is_weight else rule.input) is None:
        return Override(False, rule.why_float())
    # Placement would leave recurrent layers float, and so do presets: a rule that does not was written to quantize one.
    is_asked_for = rule.force or layers.is_on_request(call) or call.role is Role.RECURRENT
    return Override(True, f"rule {rule.name!r} asks for it") if is_asked_for else None


def _of_one_operand(calls: list[Decision], rule: Rule, layers: Layers) -> _Placed:
    first = calls[0]
    deciding = next((decision for decision in calls if not decision.quantized), first)
    if not deciding.quantized:
        return _Placed(calls, None, deciding.reason)
    grid = rule.weight if first.is_weight else rule.input
    chosen = grid if isinstance(grid, QuantDescriptor) else layers.default_grid(first)
    chosen = checked_grid(first.name, chosen)
    return _Placed(calls, chosen if first.amax is None else chosen.replace(amax=first.amax), deciding.reason)


def _slot(placed: Mapping[str, _Placed], target: str, groups: Groups) -> Slot:
    of_target = placed.get(target)
    chosen = next((one for one in placed.values() if one.grid is not None), next(iter(placed.values())))
    grids = {name: one.grid for name, one in placed.items() if one.grid is not None}
    fixed = {grid.amax for grid in grids.values()} - {None}
    if len(fixed) == 1:  # a range that is known for one target, such as that of a softmax, is known for all
        grids = {name: grid.replace(amax=amax) for name, grid in grids.items() for amax in fixed}
    if len({tuple(getattr(grid, field) for field in _OF_THE_RANGE) for grid in grids.values()}) > 1:
        raise RecipeError(
            f"{chosen.decisions[0].name}: expected grids with the same {', '.join(_OF_THE_RANGE)} for all targets, "
            f"which share its range, got {', '.join(f'{grid} for {name}' for name, grid in grids.items())}"
        )
    return Slot(
        chosen.decisions[0],
        grids,
        "no decision" if of_target is None else of_target.reason,
        tuple(_key(decision, groups) for decision in chosen.decisions),
    )


def _key(decision: Decision, groups: Groups) -> Hashable:
    value = decision.value
    if decision.is_weight and value is not None:
        return ("weight", value.parameter or (decision.call.name, decision.operand))
    # A cell is called for each step, of which there may be more or less than in the example: one range for all.
    if value is None or decision.amax is not None or decision.call.role is Role.CELL:
        return ("fixed", decision.call.name, decision.operand)
    return ("value", value.index) if decision.own_range else ("group", groups.of(value).index)


def _report(model: nn.Module, slots: tuple[Slot, ...], target: str, layers: Layers) -> ConversionReport:
    reports: dict[str, LayerReport] = {}
    for slot in slots:
        if not _has_weights(slot.call):
            continue
        name = slot.call.name
        layer = reports.get(name, LayerReport(name, layers.type_name(slot.call), reason=slot.reason))
        grid = slot.grids.get(target)
        if grid is not None and slot.first.is_weight:
            layer = dataclasses.replace(layer, reason="", weight=grid)
        elif grid is not None:
            layer = dataclasses.replace(layer, reason="", input=grid)
        reports[name] = layer
    expected = tuple(cls for cls in weighted() if is_on_request(cls) or not is_seen_through(cls))
    called = {slot.call.module for slot in slots if _has_weights(slot.call)}
    read = {value.parameter for slot in slots if is_layer(slot.call) and (value := slot.call.operand(1)) is not None}
    for name, module in model.named_modules():
        if isinstance(module, expected) and name not in called and f"{name}.weight".lstrip(".") not in read:
            absent = NOT_ASKED_FOR.reason if is_on_request(type(module)) else "was not called in the example forward"
            reports[name] = LayerReport(name, type_name_of(module), reason=absent)
    first: dict[Hashable, str] = {}
    edges = []
    for slot in slots:
        grid = slot.grids.get(target)
        shared = set() if grid is None else {first.setdefault((key, grid), slot.name) for key in slot.keys}
        with_ = tuple(sorted(shared - {slot.name}))
        edges.append(EdgeReport(slot.name, layers.type_name(slot.call), grid, slot.reason, with_, slot.first.is_weight))
    return ConversionReport(tuple(reports.values()), tuple(edges))
