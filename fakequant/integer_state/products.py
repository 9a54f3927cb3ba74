"""Which weights of a model are quantized, and what is multiplied with each and added to the product."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fakequant.batches import model_arguments
from fakequant.call_sites import CallSite, Role, call_sites
from fakequant.call_sites.ops import op_named, operands
from fakequant.nn import QuantMixin, TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.modules.quant_module import QuantProduct, quantizer_name
from fakequant.nn.walk import Weight

_GATES = {nn.LSTM: "ifgo", nn.LSTMCell: "ifgo", nn.GRU: "rzn", nn.GRUCell: "rzn"}
"""The gates whose rows torch stacks in one weight, in its order."""

_INPUTS = {
    "weight_ih": "input",
    "weight_hh": "hidden",
    "weight_ih_l0": "input",
    "weight_ih_l0_reverse": "input",
    "query_weight": "query",
    "key_weight": "key",
    "value_weight": "value",
}
"""What a layer with several weights multiplies each with; the others are multiplied with floats."""


class Product(NamedTuple):
    """A product with a quantized weight.

    Attributes:
        name: of the weight.
        quantizer: of the weight.
        weight: as it is now.
        channels: the axis of the weight that the bias belongs to; None if that is no single one.
        input: the quantizer of the other factor; None where there is none.
        bias: that is added.
        gates: whose rows are stacked in the weight.
    """

    name: str
    quantizer: TensorQuantizer
    weight: Tensor
    channels: int | None
    input: nn.Module | None
    bias: Tensor | None
    gates: str = ""

    @property
    def bias_name(self) -> str:
        """The name of the bias."""
        path, _, name = self.name.rpartition(".")
        return f"{path}.{name.replace('weight', 'bias')}".lstrip(".")


def products_of_modules(model: nn.Module) -> Iterator[Product]:
    """Yield the products of quantized layers, also of those that share a weight or its quantizer."""
    for path, module in model.named_modules():
        if not isinstance(module, QuantMixin):
            continue
        axis = module.default_quant_desc_weight.axis
        for name, quantizer in module.weight_quantizers():
            if quantizer.is_enabled:
                yield Product(
                    f"{path}.{name}".lstrip("."),
                    quantizer,
                    Weight(module, name).tensor.detach(),
                    axis if isinstance(axis, int) else None,
                    _input_quantizer(module, name),
                    _bias_of_module(module, name),
                    "" if name.startswith("weight_hr") else _GATES.get(module.float_class, ""),
                )


def _input_quantizer(module: QuantMixin, weight: str) -> nn.Module | None:
    """Return the quantizer of what a module multiplies a weight with."""
    is_only = weight == "weight" and module.input_names == ("input",)
    return module._modules.get(quantizer_name("input" if is_only else _INPUTS.get(weight, "")))


def _bias_of_module(module: QuantMixin, weight: str) -> Tensor | None:
    if isinstance(module, nn.MultiheadAttention):
        stacked = module.in_proj_bias
        return None if stacked is None else stacked.chunk(3)[module.weight_names.index(weight)]
    if isinstance(module, QuantProduct):
        return module.bias_in_eval()
    found = getattr(module, weight.replace("weight", "bias"), None) if "weight" in weight else None
    return found if isinstance(found, Tensor) else None


def weights_of_calls(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return {name: quantizer} of the weights of functional calls."""
    return {
        f"{path}.{operand}": quantizer
        for path, site in call_sites(model)
        for operand, quantizer in zip(site.weights, site.weight_quantizers, strict=True)
        if quantizer.is_enabled and operand not in site.stand_by
    }


def products_of_calls(model: nn.Module, example_inputs: Any) -> dict[str, Product]:
    """Run the model once and return the products of its functional calls, by name."""
    quantizers = weights_of_calls(model)
    found: dict[str, Product] = {}
    hooks = [
        site.register_forward_pre_hook(functools.partial(_note, found, quantizers, path))
        for path, site in call_sites(model)
        if site.weights
    ]
    args, kwargs = (example_inputs, {}) if isinstance(example_inputs, tuple) else model_arguments(example_inputs)
    try:
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _note(
    found: dict[str, Product], quantizers: dict[str, TensorQuantizer], path: str, site: nn.Module, call: Any
) -> None:
    """Take note of the weights of one call: a hook of its site, which is given what the function is given."""
    _, _, args, kwargs = call
    assert isinstance(site, CallSite)
    op = op_named(site.kind)
    assert op is not None
    channels, bias = None, None
    if op.role is Role.WEIGHTED:
        channels, bias = op.weight_axis, args[2] if len(args) > 2 else kwargs.get("bias")
    other = None if "input" in site.stand_by else site._modules.get("input")
    for index, tensor in enumerate(operands(op, args, kwargs)):
        name = f"{path}.{op.operand_name(index)}"
        if name in quantizers:
            found[name] = Product(name, quantizers[name], tensor.detach(), channels, other, bias)
