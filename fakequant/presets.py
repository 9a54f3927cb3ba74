"""Recipes by name.

>>> recipe = preset("int8") + Rule("fc", input=None, weight=None) + Rule(type="MaxPool*")
>>> recipe.decide("conv1", "Conv2d").weight
<Grid.DEFAULT: 'default'>
>>> recipe.decide("fc", "Linear").is_float
True
"""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.errors import InvalidTypeError, RecipeError
from fakequant.nn.modules.recurrent import RUNS_IN_FLOAT, UINT8_OF_CALL, QuantRecurrent
from fakequant.nn.registry import weighted, weighted_by_default
from fakequant.recipe import Recipe, Rule

MATMUL_WEIGHT = QUANT_DESC_8BIT_PER_TENSOR.replace(axis=1, narrow_range=True)
"""Grid of the weight in ``x @ weight``: per output channel, which are its columns."""

_MATMULS = ("matmul", "mm")
_CONV_TRANSPOSE = Rule(
    type="ConvTranspose*", input=None, weight=None, reason="a transposed convolution has no kernel for ranges of a call"
)
_TOKENS_OF_CALL = QuantDescriptor(8, axis="tokens", dynamic=True)
_FP8 = QuantDescriptor((4, 3))
_INT4_BLOCKS = QuantDescriptor(4, block_size=128, dynamic=True)


def _recurrent_types() -> tuple[str, ...]:
    return tuple(cls.__name__ for cls, quantized in weighted().items() if issubclass(quantized, QuantRecurrent))


def _weight_grids() -> dict[str, QuantDescriptor]:
    """Return the default grid of the weight of each layer but recurrent ones, also as a function, by its type."""
    grids = {cls.__name__: quantized.default_quant_desc_weight for cls, quantized in weighted_by_default().items()}
    for recurrent in _recurrent_types():
        del grids[recurrent]
    return grids | dict.fromkeys(_MATMULS, MATMUL_WEIGHT)


def _linear_types() -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in weighted_by_default() if issubclass(cls, nn.Linear | nn.MultiheadAttention))


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
    rules = (Rule(type=name, input=UINT8_OF_CALL, weight=grid.replace(dynamic=True)) for name, grid in grids.items())
    return Recipe(defaults=(*rules, _CONV_TRANSPOSE), ops=None)


def _dynamic_lstm() -> Recipe:
    """The same, of LSTM too."""
    recipe, weight = _dynamic(), weighted_by_default()[nn.LSTM].default_quant_desc_weight.replace(dynamic=True)
    return replace(recipe, defaults=(*recipe.defaults, Rule(type="LSTM", input=UINT8_OF_CALL, weight=weight)))


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
    "dynamic-lstm": _dynamic_lstm,
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
    ``dynamic-lstm``       the same, and LSTM, which is DynamicQuantizeLSTM in files for ONNX Runtime CPU
    ``dynamic-per-token``  as ``dynamic``, of linear layers one range for each vector that they multiply
    ``int4``               4-bit weights of linear layers in blocks of 128, nothing else
    ``fp8``                FP8 E4M3 inputs per tensor, FP8 E4M3 weights per channel
    =====================  ==========================================================================

    The dynamic ones and ``int4`` need no calibration. All but ``dynamic-lstm`` leave LSTM float, and all leave
    GRU and RNN float, which no target computes in integers; a rule for the type quantizes them.

    Raises:
        RecipeError: the name is unknown.
    """
    if name not in _PRESETS:
        raise RecipeError(f"recipe: expected one of {sorted(_PRESETS)}, got {name!r}")
    recipe = _PRESETS[name]()
    in_float = (Rule(type=name, input=None, weight=None, reason=RUNS_IN_FLOAT) for name in _recurrent_types())
    return replace(recipe, defaults=(*in_float, *recipe.defaults))
