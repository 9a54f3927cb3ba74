"""Name the scales and zero points of Q and DQ after their quantizer, where torch left ``val_12``."""

import onnx_ir as ir

from fakequant.export.graph import QUANTIZER_KEY
from fakequant.export.rules.merge_quantizers import SEPARATOR

_PAIR = frozenset({"DequantizeLinear", "QuantizeLinear"})


class NameScales(ir.passes.InPlacePass):
    """Renames initializers; one that several nodes share is named after the first."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename."""
        renamed: set[ir.Value] = set()
        for node in model.graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            if node.op_type not in _PAIR:
                continue
            quantizer = node.metadata_props.get(QUANTIZER_KEY, "").split(SEPARATOR)[0]
            for value, role in zip(node.inputs[1:], ("scale", "zero_point"), strict=False):
                name = f"{quantizer}.{role}"
                if not quantizer or value is None or not value.is_initializer() or value in renamed:
                    continue
                if name not in model.graph.initializers:
                    value.name = name
                    renamed.add(value)
        return ir.passes.PassResult(model, modified=bool(renamed))
