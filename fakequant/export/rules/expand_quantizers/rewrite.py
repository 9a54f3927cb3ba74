"""Replace every marker by what its quantizer is in ONNX."""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from fakequant.descriptor_fields import UNIFORM
from fakequant.export.graph import DOMAIN, constant_of
from fakequant.export.rules.expand_quantizers.dynamic import quantize_dynamic
from fakequant.export.rules.expand_quantizers.marker import Marker
from fakequant.export.rules.expand_quantizers.signs import quantize_signs
from fakequant.export.rules.expand_quantizers.static import quantize_static
from fakequant.export.rules.expand_quantizers.stored import Stored
from fakequant.export.targets.accepts import Use
from fakequant.nn import TensorQuantizer


class ExpandQuantizers(ir.passes.InPlacePass):
    """Replaces every marker.

    Args:
        quantizers: by name, as traced.
    """

    def __init__(self, quantizers: Mapping[str, TensorQuantizer]) -> None:
        super().__init__()
        self._quantizers = quantizers

    def uses(self, model: ir.Model) -> dict[str, Use]:
        """Return {name of a quantizer: what it is used for in a graph}, for those that have a marker there."""
        found: dict[str, Use] = {}
        for marker in self._markers(model):
            constant = constant_of(marker.data)
            use = Use(marker.grid, None if constant is None else constant.shape)
            if found.setdefault(marker.name, use).stored is not None:  # an activation is refused more
                found[marker.name] = use
        return found

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        modified, stored = False, Stored()
        for marker in self._markers(model):
            modified = True
            constant = constant_of(marker.data)
            if constant is not None:
                marker.replace_by(stored.dequantized(marker, constant))
            elif marker.grid.scheme != UNIFORM:
                marker.replace_by(quantize_signs(marker))
            elif marker.quantizer.needs_range:
                marker.replace_by(quantize_static(marker))
            else:
                marker.replace_by(quantize_dynamic(marker))
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified)

    def _markers(self, model: ir.Model) -> Iterator[Marker]:
        for node in list(model.graph.all_nodes()):
            if node.domain == DOMAIN:
                quantizer = self._quantizers[node.attributes["name"].as_string()]
                yield Marker(node, quantizer, model.opset_imports[""])
