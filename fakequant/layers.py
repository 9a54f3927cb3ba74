"""The layers of a model: what rules and reports call them, and the grids that they get without a rule."""

from torch import nn

from fakequant.call_sites import Call, Role
from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from fakequant.nn import QuantInputMixin, QuantMixin, TensorQuantizer, quantized_class_of, registered, why_unreachable
from fakequant.nn.registry import float_class_of, is_on_request
from fakequant.placement import Decision
from fakequant.placement.sizes import groups_of
from fakequant.presets import MATMUL_WEIGHT


def type_name_of(module: nn.Module) -> str:
    """Return what rules and reports call the type of a module: its float class."""
    return (float_class_of(type(module)) or type(module)).__name__


class Layers:
    """What layers are called in rules and reports, and the grids they get without a rule."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())

    def type_name(self, call: Call) -> str:
        """Return the float class of a module call; "Linear" for F.linear; the kind of any other op."""
        cls = self._quantized_class(call)
        return call.kind if cls is None else cls.float_class.__name__

    def why_unreachable(self, call: Call) -> str:
        """Return why no quantizer can stand at a call, "" if one can."""
        return why_unreachable(self._modules[call.module])

    def is_on_request(self, call: Call) -> bool:
        """Whether a call is of a module that stays float unless a rule names its type."""
        return call.is_module and is_on_request(type(self._modules[call.module]))

    def is_disabled(self, call: Call, is_weight: bool) -> bool:
        """Whether the layer has quantizers already, all of them switched off."""
        own = self._own_quantizers(call, is_weight)
        return bool(own) and not any(quantizer.is_enabled for quantizer in own.values())

    def default_grid(self, decision: Decision) -> QuantDescriptor:
        """Return the grid that an operand of a layer has already, or that its class gives it."""
        own = self._own_quantizers(decision.call, decision.is_weight).get(decision.operand_name)
        if own is not None:
            return own.descriptor
        found, op = self._quantized_class(decision.call), decision.call.op
        if found is None and op is not None and decision.is_weight and decision.operand_name in op.weights:
            axis = op.weights[decision.operand_name]
            return QUANT_DESC_8BIT_PER_TENSOR.replace(axis=axis, narrow_range=True)
        if not decision.is_weight:
            return QUANT_DESC_8BIT_PER_TENSOR if found is None else found.default_quant_desc_input
        if found is not None and issubclass(found, QuantMixin):
            grid = found.default_quant_desc_weight
            return grid.replace(axis=None) if _is_grouped_transposed(decision.call) else grid
        return MATMUL_WEIGHT

    def _quantized_class(self, call: Call) -> type[QuantInputMixin] | None:
        """Return the quantized class of a module, or of the layer that a function is."""
        if not call.is_module:
            return next((quantized for cls, quantized in registered() if _is_function_of(cls, call)), None)
        cls = type(self._modules[call.module])
        return cls if issubclass(cls, QuantInputMixin) else quantized_class_of(cls)

    def _own_quantizers(self, call: Call, is_weight: bool) -> dict[str, TensorQuantizer]:
        module = self._modules[call.module]
        if not call.is_module or not isinstance(module, QuantInputMixin):
            return {}
        if is_weight:
            return dict(module.weight_quantizers()) if isinstance(module, QuantMixin) else {}
        return dict(zip(module.input_names, module.input_quantizers(), strict=True))


def _is_grouped_transposed(call: Call) -> bool:
    """Whether a call is a transposed convolution in groups, for which no runtime has a range for each channel."""
    return call.kind.startswith("conv_transpose") and groups_of(call) > 1


def _is_function_of(cls: type[nn.Module], call: Call) -> bool:
    return call.role in (Role.WEIGHTED, Role.RECURRENT) and cls.__name__.lower() == call.kind.replace("_", "")
