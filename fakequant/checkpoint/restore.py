"""From a manifest to quantizers: a float model becomes the quantized one that the manifest was made of."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fakequant.call_sites import PerCall, hide, intercept, own_class
from fakequant.checkpoint.fields import as_mapping
from fakequant.checkpoint.manifest import Manifest, own_modules, read_manifest
from fakequant.checkpoint.modules import SavedModule, check_weights
from fakequant.convert import dequantize, quantizers_to_device, undone_on_error
from fakequant.errors import CheckpointError, FakeQuantError
from fakequant.nn import QuantInputMixin, QuantMixin, TensorQuantizer
from fakequant.nn.forms import form_named, plain_class_of
from fakequant.nn.modules.batchnorm import FOLDED, FoldedNorm
from fakequant.nn.modules.folded_layers import FOLDED_LAYERS, FoldedLayer, fold
from fakequant.nn.modules.quant_module import quantizer_name
from fakequant.nn.walk import named_quantizers
from fakequant.nn.wrappers import check_is_bare
from fakequant.retarget import QUANTIZED_FOR

_Model = TypeVar("_Model", bound=nn.Module)


def quantize_like(model: _Model, manifest: Mapping[str, Any]) -> _Model:
    """Quantize a model like the one that a manifest was made of, in place, without example and recipe.

    Load the state afterwards: the ranges are there. Quantizers that the model has already, such as those of
    ``initialize``, are replaced. Modes, dtypes and devices stay as they are.

    Args:
        model: built by the same code.
        manifest: from ``manifest_of``.

    Returns:
        The model.

    Raises:
        InvalidTypeError: no module, or a wrapper around the model.
        CheckpointError: the manifest does not fit the model, or is not what ``manifest_of`` returned; a quantized
            class or an op of a user's own that is not registered. The model is unchanged after every error.

    >>> from fakequant import manifest_of, quantize
    >>> trained = nn.Sequential(nn.Linear(2, 2))
    >>> _ = quantize(trained)
    >>> model = quantize_like(nn.Sequential(nn.Linear(2, 2)), manifest_of(trained))
    >>> _ = model.load_state_dict(trained.state_dict())
    """
    check_is_bare(model)
    try:
        saved = read_manifest(as_mapping(manifest, "manifest"))
    except RecursionError:
        raise CheckpointError("manifest: expected what manifest_of returns, got a deeper nesting") from None
    modules, aliases = own_modules(model)
    _check_structure(saved, modules, aliases)
    with undone_on_error(model):
        dequantize(model)
        for name, module in modules.items():
            _restore(name or "model", module, saved.modules[name])
        for layer, norm in saved.folded.items():
            _fold(layer, modules[layer], modules[norm])
        for name, module in modules.items():
            if saved.modules[name].is_hidden:
                hide(module)
        quantizers_to_device(model)
        _check_is_whole(model, saved)
    return model


def _check_structure(saved: Manifest, modules: Mapping[str, nn.Module], aliases: Mapping[str, str]) -> None:
    absent = [name for name in saved.modules if name not in modules]
    unknown = [name for name in modules if name not in saved.modules]
    if absent or unknown:
        raise CheckpointError(
            f"model: expected the {len(saved.modules)} modules of the saved one, got none for {absent[:5]}, "
            f"and {unknown[:5]} besides"
        )
    if aliases != saved.aliases:
        raise CheckpointError(f"model: expected modules with several names {dict(saved.aliases)}, got {dict(aliases)}")
    for name, module in modules.items():
        if isinstance(module, FoldedLayer | FoldedNorm):
            raise CheckpointError(
                f"{name or 'model'}: expected a model without folded batch norms, got one; call unfold_batchnorm first"
            )
        found = plain_class_of(own_class(module)).__name__
        if found != saved.modules[name].class_name:
            raise CheckpointError(f"{name or 'model'}: expected {saved.modules[name].class_name}, got {found}")


def _restore(name: str, module: nn.Module, saved: SavedModule) -> None:
    plain = plain_class_of(type(module))
    form = _form(name, plain, saved.form)
    if type(module) is not form:
        module.__class__ = form
    if saved.form and isinstance(module, QuantInputMixin):
        _start(name, module)
    _put(name, module, saved)
    if saved.targets or saved.is_float:
        _check_targets(name, module, saved)
        setattr(module, QUANTIZED_FOR, saved.targets)
    if saved.is_float:
        module.__class__ = plain  # the present target does not want it, another one does
    elif form.train is not nn.Module.train:
        module.train(module.training)  # a frozen layer stays in eval mode
    if saved.sites is not None:
        intercept(module, saved.sites.train(module.training))


def _form(name: str, plain: type[nn.Module], form: str) -> type[nn.Module]:
    """Return the class that a module of a plain class becomes."""
    found = form_named(plain, form) if form else plain
    if found is None:
        raise CheckpointError(
            f"{name}: expected a class {form} for {plain.__name__}, got none; register it before loading"
        )
    return found


def _check_targets(name: str, module: nn.Module, saved: SavedModule) -> None:
    if not saved.targets or not isinstance(module, QuantInputMixin):
        found = f"{saved.form or saved.class_name} for {sorted(saved.targets)}"
        raise CheckpointError(f"{name}: expected a quantized class and the targets that want it, got {found}")


def _start(name: str, module: QuantInputMixin) -> None:
    """Do what quantizing did, but for the quantizers: a class of a user's own may add more than these."""
    try:
        module.init_quantizer()
    except FakeQuantError as error:
        raise CheckpointError(f"{name}: {error}") from error
    for tensor in module.quantized_names():
        module._modules.pop(quantizer_name(tensor), None)


def _put(name: str, module: nn.Module, saved: SavedModule) -> None:
    allowed = {child for child, held in module._modules.items() if isinstance(held, TensorQuantizer | PerCall)}
    if isinstance(module, QuantInputMixin):
        allowed |= {quantizer_name(tensor) for tensor in module.quantized_names()}
    if wrong := [child for child in saved.quantizers if child not in allowed]:
        raise CheckpointError(f"{name}: expected quantizers among {sorted(allowed)}, got {wrong}")
    for child, quantizer in saved.quantizers.items():
        module._modules[child] = quantizer.train(module.training)
    if isinstance(module, QuantInputMixin):
        absent = [tensor for tensor in module.input_names if module._modules.get(quantizer_name(tensor)) is None]
        if absent:
            raise CheckpointError(f"{name}: expected a quantizer for each input, got none for {absent}")
    if isinstance(module, QuantMixin):
        check_weights(name, {tensor: module._modules.get(quantizer_name(tensor)) for tensor in module.weight_names})


def _fold(name: str, layer: nn.Module, norm: nn.Module) -> None:
    can_fold = type(layer) in FOLDED_LAYERS and type(norm) in FOLDED and norm.running_var is not None
    if not can_fold or norm.num_features != getattr(layer, "out_channels", getattr(layer, "out_features", None)):
        found = f"{type(layer).__name__} and {type(norm).__name__}"
        raise CheckpointError(f"{name}: expected a layer and a batch norm that can be folded into it, got {found}")
    fold(layer, norm)  # type: ignore[arg-type]


def _check_is_whole(model: nn.Module, saved: Manifest) -> None:
    """Check that every quantizer of the model is a new one: code may have made some that the saved one had not."""
    slots = [slot for module in saved.modules.values() for slot in module.quantizers.values()]
    sites = [module.sites for module in saved.modules.values() if module.sites is not None]
    new = {quantizer for held in (*slots, *sites) for _, quantizer in named_quantizers(held)}
    if left := [name for name, quantizer in named_quantizers(model) if quantizer not in new]:
        raise CheckpointError(f"model: expected the quantizers of the saved one, got {left[:5]} besides")
