"""Recipes: which layers get which grids.

A recipe is a list of rules; for each layer the last rule that matches decides. The
defaults of a preset may match nothing; a rule that a user adds must match a layer.
"""

import dataclasses
import enum
import fnmatch
from collections.abc import Collection, Mapping

from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError, RecipeError
from fakequant.nn.modules.quant_module import checked_input_grid
from fakequant.targets import placement_names, placement_of


class Grid(enum.Enum):
    """A grid that is looked up in the quantized class."""

    DEFAULT = "default"
    """The class default: 8 bits, per tensor on inputs, per output channel on weights."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which layers, and the grids they get.

    Args:
        name: shell pattern over names of modules and call sites, such as ``"layer4.*"`` or
            ``"*.add_0"``; matches case-sensitively.
        type: shell pattern over float class names and ops, such as ``"Conv*"`` or ``"add"``.
        input: grid of the input; ``Grid.DEFAULT`` for the class default; None leaves it float.
        weight: grid of the weight, likewise. ``input=None, weight=None`` leaves the layer float.
        reason: shown in the report for layers that this rule leaves float.
        force: quantize also what the target's placement would leave float.
        target: shell pattern over placements: ``"tensorrt"``, which ``tensorrt-ep`` and ``onnxruntime-cuda``
            have too, and ``"onnxruntime"``. Targets of one placement share their quantizers, so no rule
            can tell them apart.
        position: ``"first"`` for layers that read the model's input, ``"last"`` for layers behind
            which there is no other; ``""`` for any.

    Raises:
        InvalidTypeError: a field of the wrong type.
        InvalidValueError: another position; a target that matches no placement; a grid for weights on the input.
    """

    name: str = "*"
    type: str = "*"
    input: QuantDescriptor | Grid | None = Grid.DEFAULT
    weight: QuantDescriptor | Grid | None = Grid.DEFAULT
    reason: str = ""
    force: bool = False
    target: str = "*"
    position: str = ""

    def __post_init__(self) -> None:
        """Check the types."""
        for field in ("name", "type", "reason", "target", "position"):
            if not isinstance(getattr(self, field), str):
                raise InvalidTypeError(f"Rule.{field}: expected a str, got {getattr(self, field)!r}")
        if not isinstance(self.force, bool):
            raise InvalidTypeError(f"Rule.force: expected a bool, got {self.force!r}")
        for field in ("input", "weight"):
            if not isinstance(getattr(self, field), QuantDescriptor | Grid | None):
                raise InvalidTypeError(
                    f"Rule.{field}: expected a QuantDescriptor, Grid.DEFAULT or None, got {getattr(self, field)!r}"
                )
        if isinstance(self.input, QuantDescriptor):
            checked_input_grid("Rule.input", self.input)
        if self.position not in POSITIONS:
            raise InvalidValueError(f"Rule.position: expected one of {sorted(POSITIONS)}, got {self.position!r}")
        if not any(fnmatch.fnmatchcase(name, self.target) for name in placement_names()):
            raise InvalidValueError(
                f"Rule.target: expected a pattern of {sorted(placement_names())}, whose rules the other targets "
                f"share, got {self.target!r}"
            )

    def matches(self, name: str, type_name: str, positions: Collection[str] = ()) -> bool:
        """Whether this rule is about the layer; positions are those that it has in the model."""
        if self.position and self.position not in positions:
            return False
        return fnmatch.fnmatchcase(name, self.name) and fnmatch.fnmatchcase(type_name, self.type)

    @property
    def is_float(self) -> bool:
        """Whether the layer stays float."""
        return self.input is None and self.weight is None

    def why_float(self) -> str:
        """Return the reason for the report."""
        position = f", position {self.position!r}" if self.position else ""
        return self.reason or f"rule {self.name!r}, type {self.type!r}{position} leaves it float"


POSITIONS = frozenset({"", "first", "last"})

NO_RULE = Rule(input=None, weight=None, reason="no rule of the recipe matches it")
NOT_ASKED_FOR = Rule(input=None, weight=None, reason="stays float unless a rule names its type")
_NO_OPS = Rule(input=None, weight=None, reason="the recipe is about layers only")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order; the last match wins. ``recipe + rule`` gives a new recipe.

    Args:
        defaults: rules that may match nothing.
        rules: rules of which each must match a layer of the model.
        ops: what decides about ops without weight (additions, poolings) that no rule is about. None keeps
            quantizers off them, and lets no layer depend on what is around it: right for ranges that each
            call brings along and for weights alone, where no code goes from one layer to the next.
    """

    defaults: tuple[Rule, ...] = ()
    rules: tuple[Rule, ...] = ()
    ops: Rule | None = Rule()

    def __add__(self, rule: Rule) -> "Recipe":
        """Return the recipe with one more rule."""
        if not isinstance(rule, Rule):
            return NotImplemented
        return dataclasses.replace(self, rules=(*self.rules, rule))

    def for_target(self, target: str) -> "Recipe":
        """Return the recipe without the rules that are about other placements than the target's.

        Raises:
            InvalidValueError: unknown target.
        """
        placement = placement_of(target)
        return dataclasses.replace(
            self, rules=tuple(rule for rule in self.rules if fnmatch.fnmatchcase(placement, rule.target))
        )

    def decide(self, name: str, type_name: str, positions: Collection[str] = ()) -> Rule:
        """Return the rule that decides about a layer."""
        matching = [rule for rule in (*self.defaults, *self.rules) if rule.matches(name, type_name, positions)]
        return matching[-1] if matching else NO_RULE

    def decide_op(self, name: str, type_name: str) -> Rule:
        """Return the rule that decides about an op without weight."""
        matching = [rule for rule in self.rules if rule.matches(name, type_name)]
        return matching[-1] if matching else self.ops or _NO_OPS

    def decide_on_request(self, name: str, type_name: str) -> Rule:
        """Return the rule that decides about a layer that stays float unless a rule names its type."""
        matching = [rule for rule in self.rules if rule.type != "*" and rule.matches(name, type_name)]
        return matching[-1] if matching else NOT_ASKED_FOR

    def check_matches(self, layers: Mapping[str, str], positions: Mapping[str, Collection[str]] | None = None) -> None:
        """Raise RecipeError for a rule that matches none of the layers {name: float class name}.

        Without positions {name: positions}, a rule that asks for one is an error too.
        """
        for rule in self.rules:
            if rule.position and positions is None:
                raise RecipeError(f"rule position={rule.position!r}: expected example_inputs, which tell it, got none")
            where = positions or {}
            if not any(rule.matches(name, type_name, where.get(name, ())) for name, type_name in layers.items()):
                position = f" position={rule.position!r}" if rule.position else ""
                raise RecipeError(
                    f"rule name={rule.name!r} type={rule.type!r}{position}: expected to match a layer, got none of "
                    f"{len(layers)}: {', '.join(list(layers)[:8])}{' ...' if len(layers) > 8 else ''}"
                )
