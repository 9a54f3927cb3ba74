"""Store weights as floats: integer initializer -> DQ becomes float initializer -> Q -> DQ.

TensorRT 8 and 9 need this form (rule R16); they have no blocks, which stay as they are. The
floats are the dequantized codes, so Q gives back the same codes, bit for bit.
"""

import onnx_ir as ir

from fakequant.export.graph import (
    QUANTIZER_KEY,
    axis_of,
    constant_of,
    dequantized_weight,
    new_initializer,
    weight_dequantizers,
)


class FloatWeights(ir.passes.InPlacePass):
    """Puts a QuantizeLinear in front of the DequantizeLinear of every stored weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every stored weight."""
        modified = False
        for node, stored in list(weight_dequantizers(model.graph)):
            values, scale = dequantized_weight(node), constant_of(node.inputs[1])
            if values is None or scale is None:
                continue
            axis = axis_of(node, scale)
            weight = new_initializer(model.graph, f"{stored.name}.values", values)
            attributes = {} if axis is None else {"axis": axis}
            quantize = ir.node("QuantizeLinear", [weight, *node.inputs[1:3]], attributes)
            quantize.name = (node.name or "weight").replace("DequantizeLinear", "QuantizeLinear")
            if QUANTIZER_KEY in node.metadata_props:
                quantize.metadata_props[QUANTIZER_KEY] = node.metadata_props[QUANTIZER_KEY]
            model.graph.insert_before(node, quantize)
            node.replace_input_with(0, quantize.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)
