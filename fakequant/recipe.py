"""Recipes: which layers get which grids.

A recipe is a list of rules; for each layer the last rule that matches decides. The
defaults of a preset may match nothing; a rule that a user adds must match a layer.

>>> recipe = preset("int8") + Rule("fc", input=None, weight=None) + Rule(type="MaxPool*")
>>> recipe.decide("conv1", "Conv2d").weight
<Grid.DEFAULT: 'default'>
>>> recipe.decide("fc", "Linear").is_float
True
"""

import dataclasses
import enum
import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import nn

from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError, RecipeError
from fakequant.nn.modules.recurrent import RUNS_IN_FLOAT, QuantRecurrent
from fakequant.nn.registry import weighted
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
        InvalidValueError: another position; a target that matches no placement.
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
        return matching[-1] if matching else NO_RULE

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


MATMUL_WEIGHT = QUANT_DESC_8BIT_PER_TENSOR.replace(axis=1, narrow_range=True)
"""Grid of the weight in ``x @ weight``: per output channel, which are its columns."""

_MATMULS = ("matmul", "mm")
_CONV_TRANSPOSE = Rule(
    type="ConvTranspose*", input=None, weight=None, reason="a transposed convolution has no kernel for ranges of a call"
)
_TENSOR_OF_CALL = QuantDescriptor(8, unsigned=True, affine=True, dynamic=True)
_TOKENS_OF_CALL = QuantDescriptor(8, axis="tokens", dynamic=True)
_FP8 = QuantDescriptor((4, 3))
_INT4_BLOCKS = QuantDescriptor(4, block_size=128, dynamic=True)


def _weight_grids() -> dict[str, QuantDescriptor]:
    """Return the default grid of the weight of each layer, also as a function, by its type."""
    grids = {float_class.__name__: cls.default_quant_desc_weight for float_class, cls in weighted().items()}
    return grids | dict.fromkeys(_MATMULS, MATMUL_WEIGHT)


def _linear_types() -> set[str]:
    return {cls.__name__ for cls in weighted() if issubclass(cls, nn.Linear | nn.MultiheadAttention)}


def _int8() -> Recipe:
    """8-bit inputs per tensor and weights per channel, of every convolution and linear layer, also as functions."""
    return Recipe(defaults=tuple(Rule(type=type_name) for type_name in _weight_grids()))


def _w4a8() -> Recipe:
    """8-bit inputs, 4-bit weights per channel."""
    grids = _weight_grids()
    return Recipe(
        defaults=tuple(Rule(type=type_name, weight=grid.replace(num_bits=4)) for type_name, grid in grids.items())
    )


def _dynamic() -> Recipe:
    """8-bit inputs, one range for each call's tensor; 8-bit weights per channel."""
    grids = _weight_grids()
    rules = (Rule(type=name, input=_TENSOR_OF_CALL, weight=grid.replace(dynamic=True)) for name, grid in grids.items())
    return Recipe(defaults=(*rules, _CONV_TRANSPOSE), ops=None)


def _dynamic_per_token() -> Recipe:
    """The same with one range for each vector that a linear layer multiplies."""
    recipe, linear = _dynamic(), {*_linear_types(), *_MATMULS}
    rules = (replace(rule, input=_TOKENS_OF_CALL) if rule.type in linear else rule for rule in recipe.defaults)
    return replace(recipe, defaults=tuple(rules))


def _int4() -> Recipe:
    """Float inputs, 4-bit weights of linear layers in blocks of 128 along the axis that is summed up."""
    axes = dict.fromkeys(_linear_types(), 1) | dict.fromkeys(_MATMULS, 0)
    rules = (Rule(type=name, input=None, weight=_INT4_BLOCKS.replace(block_axis=axis)) for name, axis in axes.items())
    return Recipe(defaults=tuple(rules), ops=None)


def _fp8() -> Recipe:
    """FP8 E4M3: inputs per tensor, weights per channel."""
    rules = (Rule(type=name, input=_FP8, weight=_FP8.replace(axis=grid.axis)) for name, grid in _weight_grids().items())
    return Recipe(defaults=tuple(rules), ops=Rule(input=_FP8, weight=_FP8))


_PRESETS: dict[str, Callable[[], Recipe]] = {
    "int8": _int8,
    "w4a8": _w4a8,
    "dynamic": _dynamic,
    "dynamic-per-token": _dynamic_per_token,
    "int4": _int4,
    "fp8": _fp8,
}


def as_recipe(recipe: object) -> Recipe:
    """Return a Recipe as it is, or the preset of a name.

    Raises:
        InvalidTypeError: anything else.
        RecipeError: unknown preset.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise InvalidTypeError(f"recipe: expected a preset's name or a Recipe, got {recipe!r}")
    return preset(recipe)


def preset(name: str) -> Recipe:
    """Return a recipe by name.

    =====================  ==========================================================================
    name                   grids
    =====================  ==========================================================================
    ``int8``               8-bit inputs per tensor, 8-bit weights per channel
    ``w4a8``               8-bit inputs per tensor, 4-bit weights per channel
    ``dynamic``            8-bit inputs, the range from each call's tensor; 8-bit weights per channel
    ``dynamic-per-token``  the same, of linear layers one range for each vector that they multiply
    ``int4``               4-bit weights of linear layers in blocks of 128, nothing else
    ``fp8``                FP8 E4M3 inputs per tensor, FP8 E4M3 weights per channel
    =====================  ==========================================================================

    The dynamic ones and ``int4`` need no calibration. All leave LSTM, GRU and RNN float, which no target
    computes in integers; a rule for the type quantizes them.

    Raises:
        RecipeError: the name is unknown.
    """
    if name not in _PRESETS:
        raise RecipeError(f"recipe: expected one of {sorted(_PRESETS)}, got {name!r}")
    recipe = _PRESETS[name]()
    recurrent = (float_class.__name__ for float_class, cls in weighted().items() if issubclass(cls, QuantRecurrent))
    in_float = (Rule(type=type_name, input=None, weight=None, reason=RUNS_IN_FLOAT) for type_name in recurrent)
    return replace(recipe, defaults=(*recipe.defaults, *in_float))
