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
class EdgeReport:
    """What became of one operand of one call.

    Args:
        name: full name: ``layer1.0.add_0.other``, ``layer1.0.conv1.input``.
        type: the layer's class, or the op.
        descriptor: grid, None if float.
        reason: why there is a quantizer, or why not.
        shares: names of earlier edges whose quantizer this one uses.
        is_weight: the operand is a weight.
    """

    name: str
    type: str
    descriptor: QuantDescriptor | None
    reason: str
    shares: tuple[str, ...] = ()
    is_weight: bool = False


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Every convolution and linear layer of a model, and every other layer that was quantized.

    Args:
        layers: what has a weight, and what was quantized besides.
        edges: every operand that placement decided about, in order of execution; empty for a
            model that was quantized without an example.
    """

    layers: tuple[LayerReport, ...]
    edges: tuple[EdgeReport, ...] = ()

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
        lines += self._other_ops()
        lines += [f"  float: {layer.name or '(root)'} ({layer.type}): {layer.reason}" for layer in self.left_float]
        return "\n".join(lines) or "no convolution or linear layer in the model"

    def _other_ops(self) -> list[str]:
        """Return one line for each op that is quantized somewhere: how many of its calls are."""
        calls: dict[str, dict[str, bool]] = {}
        named = {layer.name for layer in self.layers}
        for edge in self.edges:
            call = edge.name.rpartition(".")[0]
            if call not in named:
                of_type = calls.setdefault(edge.type, {})
                of_type[call] = of_type.get(call, False) or edge.descriptor is not None
        return [f"{sum(of.values())} of {len(of)} {name} quantized" for name, of in calls.items() if any(of.values())]

    def edge_table(self) -> str:
        """Return one line an edge: its name, its grid or "float", and the reason."""
        width = max((len(edge.name) for edge in self.edges), default=0)
        lines = []
        for edge in self.edges:
            grid = "float" if edge.descriptor is None else f"{edge.descriptor.num_bits}bit"
            shares = f"; shares with {', '.join(edge.shares)}" if edge.shares else ""
            lines.append(f"  {edge.name:<{width}}  {grid:<6} {edge.reason}{shares}")
        return "\n".join(lines)
