"""Quantize a model that exists, in place, and make it float again.

A module becomes quantized by assigning its ``__class__`` and adding quantizers, so its
identity, parameters, hooks, ties and place in an optimizer survive. Look-up is by exact
type: a subclass with a forward of its own is left alone and reported.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fakequant.call_sites import CallSite, CallSites, PerCall, release
from fakequant.conversion_report import ConversionReport, LayerReport
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError
from fakequant.install import install
from fakequant.layers import type_name_of
from fakequant.nn import QuantInputMixin, QuantMixin, TensorQuantizer, quantized_class_of, why_unreachable
from fakequant.nn.modules.folded_layers import unfold
from fakequant.nn.modules.quant_attention import QuantMultiheadAttention
from fakequant.nn.modules.quant_module import quantizer_name
from fakequant.nn.modules.transformer import undo_unfuse, unfuse
from fakequant.nn.registry import float_class_of, is_given, is_on_request, weighted
from fakequant.nn.sharding import check_whole
from fakequant.nn.walk import named_quantizers
from fakequant.plan import plan
from fakequant.presets import as_recipe
from fakequant.recipe import NOT_ASKED_FOR, Grid, Recipe, Rule
from fakequant.retarget import QUANTIZED_FOR


def quantize(
    model: nn.Module, recipe: str | Recipe = "int8", *, example_inputs: Any = None, target: str = "tensorrt"
) -> ConversionReport:
    """Quantize a model in place.

    With an example, quantizers go where the target fuses them, functional ops included (see
    ``fakequant.plan``). Without, the inputs and weights of layers are quantized. A layer that is
    quantized already, such as by ``initialize``, keeps its grids.

    Args:
        model: any module; also a single layer.
        recipe: a preset's name or a Recipe.
        example_inputs: one batch: a tuple of arguments, a dict of keyword arguments, or a tensor.
        target: that is simulated from now on: "tensorrt", "tensorrt-ep", "onnxruntime-cuda" or "onnxruntime";
            see ``fakequant.retarget``.

    Returns:
        What became quantized, and for every convolution or linear layer that did not, why.

    Raises:
        InvalidTypeError: model is no nn.Module; recipe neither str nor Recipe.
        RecipeError: unknown preset, or a rule that matches nothing.
        InvalidValueError: unknown target; a grid that no module can use; with an example, a model that has
            call sites or ranges already; parameters that ``fully_shard`` has split. The model is unchanged after
            every error.

    >>> from fakequant import preset
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> print(quantize(model, preset("int8") + Rule("2", input=None, weight=None, reason="sensitive")))
    1 of 1 Conv2d quantized
    0 of 1 Linear quantized
      float: 2 (Linear): sensitive
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_whole(model)
    if example_inputs is not None:
        return _quantize_placed(model, as_recipe(recipe), example_inputs, target)
    rules = as_recipe(recipe).for_target(target)
    modules = dict(model.named_modules())
    rules.check_matches({name: type_name_of(m) for name, m in modules.items() if _is_matched(name, m, rules)})
    expected = tuple(weighted())
    layers = []
    with undone_on_error(model):
        for name, module in modules.items():
            is_expected = isinstance(module, expected)
            layer = _convert(name, module, rules, modules.get(name.rpartition(".")[0]) if name else None)
            if layer.is_quantized or is_expected:
                layers.append(layer)
        quantizers_to_device(model)
        _quantizers_to_mode(model)
    unfuse(model)
    return ConversionReport(tuple(layers))


def _quantize_placed(model: nn.Module, recipe: Recipe, example_inputs: Any, target: str) -> ConversionReport:
    planned = plan(model, example_inputs, target, recipe)
    with undone_on_error(model):
        for module in model.modules():
            if type(module) is QuantMultiheadAttention:
                _drop_quantizers(module)
        unfuse(model, everywhere=True)
        install(model, planned)
        undo_unfuse(model, everywhere=False)
        quantizers_to_device(model)
        _quantizers_to_mode(model)
    return planned.report


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Put the class and the attributes of every module back on an error: children, hooks, switches, grids."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    contents = [(held, held.copy()) for _, _, state in before for held in state.values() if isinstance(held, dict)]
    try:
        yield
    except Exception:
        for module, cls, state in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(state)
        for held, content in contents:
            held.clear()
            held.update(content)
        raise


def quantizers_to_device(model: nn.Module) -> None:
    """Move quantizers to where the model works: a pool or an add has nothing of its own that says so."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None:
        for _, quantizer in named_quantizers(model):
            quantizer.to(device)


def _quantizers_to_mode(model: nn.Module) -> None:
    """Put quantizers into the mode of the module that they belong to: in training mode, ranges may follow the data."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, TensorQuantizer | PerCall | CallSites | CallSite):
                child.train(module.training)


def dequantize(model: nn.Module) -> nn.Module:
    """Make a model float again, in place: remove the quantizers and restore torch's classes. Weights stay as they are.

    Also undoes ``initialize()`` for a model that was built under it.

    Raises:
        InvalidValueError: parameters that ``fully_shard`` has split. The model is unchanged.

    >>> model = nn.Linear(2, 2)
    >>> _ = quantize(model)
    >>> type(dequantize(model)) is nn.Linear
    True
    """
    check_whole(model)
    for module in list(model.modules()):
        _make_float(module)
    undo_unfuse(model)
    return model


def _make_float(module: nn.Module) -> None:
    release(module)
    unfold(module)
    if vars(module).pop(QUANTIZED_FOR, None):
        module.__class__ = quantized_class_of(type(module)) or type(module)  # the present target may leave it float
    if isinstance(module, QuantInputMixin) and is_given(type(module)):
        _drop_quantizers(module)
        module.__class__ = type(module).float_class  # type: ignore[assignment]


def _drop_quantizers(module: QuantInputMixin) -> None:
    """Remove the quantizers that its quantized class gave a module."""
    for tensor in module.quantized_names():
        module._modules.pop(quantizer_name(tensor), None)


def _is_quantizable(module: nn.Module) -> bool:
    """Whether a registered class is about a module: float and exactly of it, or quantized already."""
    return quantized_class_of(type(module)) is not None or float_class_of(type(module)) is not None


def _is_matched(name: str, module: nn.Module, recipe: Recipe) -> bool:
    """Whether rules can be about a module."""
    if is_on_request(type(module)):
        return recipe.decide_on_request(name, type(module).__name__) is not NOT_ASKED_FOR
    return _is_quantizable(module)


def _convert(name: str, module: nn.Module, recipe: Recipe, parent: nn.Module | None) -> LayerReport:
    """Convert one module and say so; its parent was before it."""
    type_name = type_name_of(module)
    if isinstance(module, QuantInputMixin):
        return _as_quantized(name, type_name, module)
    if isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, QuantMultiheadAttention):
        return LayerReport(name, type_name, reason="nn.MultiheadAttention reads its weight; its forward never runs")
    quantized_class = quantized_class_of(type(module))
    reason = _why_unknown(module) if quantized_class is None else why_unreachable(module)
    if quantized_class is None or reason:
        return LayerReport(name, type_name, reason=reason)
    decide = recipe.decide_on_request if is_on_request(type(module)) else recipe.decide
    rule = decide(name, type_name)
    if rule.is_float:
        return LayerReport(name, type_name, reason=rule.why_float())
    module.__class__ = quantized_class
    assert isinstance(module, QuantInputMixin)
    _add_quantizers(module, rule)
    return _as_quantized(name, type_name, module)


def _add_quantizers(module: QuantInputMixin, rule: Rule) -> None:
    def grid(choice: QuantDescriptor | Grid | None) -> QuantDescriptor | None:
        return choice if isinstance(choice, QuantDescriptor) else None

    if isinstance(module, QuantMixin):
        module.init_quantizer(grid(rule.input), grid(rule.weight))
        if rule.weight is None:
            for _, quantizer in module.weight_quantizers():
                quantizer.disable()
    else:
        module.init_quantizer(grid(rule.input))
    if rule.input is None:
        for quantizer in module.input_quantizers():
            quantizer.disable()


def _as_quantized(name: str, type_name: str, module: QuantInputMixin) -> LayerReport:
    weights = (quantizer for _, quantizer in module.weight_quantizers()) if isinstance(module, QuantMixin) else ()
    layer = LayerReport(name, type_name, _grid_in_use(module.input_quantizers()), _grid_in_use(weights))
    if layer.is_quantized:
        return layer
    return LayerReport(name, type_name, reason="its quantizers are disabled")


def _grid_in_use(quantizers: Iterable[nn.Module]) -> QuantDescriptor | None:
    """Return the grid of the first of a layer's quantizers that is in use; a placed layer may share one per call."""
    enabled = (q for q in quantizers if isinstance(q, TensorQuantizer) and q.is_enabled)
    return next((quantizer.descriptor for quantizer in enabled), None)


def _why_unknown(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        return "its parameters are computed by torch.nn.utils.parametrize; remove the parametrization first"
    bases = [cls.__name__ for cls in type(module).__mro__[1:] if quantized_class_of(cls) is not None]
    if not bases:
        return "no quantized class is registered for it"
    return f"{type(module).__name__} is a subclass of {bases[0]} and may have its own forward; register a class for it"
