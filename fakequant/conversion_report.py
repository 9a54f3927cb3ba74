"""What conversion did to a model, layer by layer."""

import dataclasses

from fakequant.descriptor import QuantDescriptor


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Args:
        name: full module name.
        type: class name before conversion.
        input: grid of the input, None if float.
        weight: grid of the weight, None if float or if there is no weight.
        reason: why the layer is float; empty for a quantized one.
    """

    name: str
    type: str
    input: QuantDescriptor | None = None
    weight: QuantDescriptor | None = None
    reason: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor of the layer is quantized."""
        return self.input is not None or self.weight is not None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Every convolution and linear layer of a model, and every other layer that was quantized."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers with a quantizer."""
        return tuple(layer for layer in self.layers if layer.is_quantized)

    @property
    def left_float(self) -> tuple[LayerReport, ...]:
        """The layers without."""
        return tuple(layer for layer in self.layers if not layer.is_quantized)

    def __str__(self) -> str:
        """Return counts by type, then every float layer with its reason."""
        lines = []
        for type_name in dict.fromkeys(layer.type for layer in self.layers):
            of_type = [layer for layer in self.layers if layer.type == type_name]
            lines.append(f"{sum(layer.is_quantized for layer in of_type)} of {len(of_type)} {type_name} quantized")
        lines += [f"  float: {layer.name or '(root)'} ({layer.type}): {layer.reason}" for layer in self.left_float]
        return "\n".join(lines) or "no convolution or linear layer in the model"
