"""Store embedding tables as floats: integer initializer -> DQ -> Gather becomes float initializer -> Gather.

TensorRT has no Gather with a scale (rule 1c). The floats are the dequantized codes: the
numbers of the quantized model, in a file that is no smaller.
"""

import onnx_ir as ir

from fakequant.export.graph import dequantized_weight, new_initializer, remove_unread, table_look_ups


class FloatTables(ir.passes.InPlacePass):
    """Replaces the DequantizeLinear in front of every Gather along the rows of a stored table."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        modified = False
        for dequantize, look_ups in list(table_look_ups(model.graph)):
            values = dequantized_weight(dequantize)
            if values is None:
                continue
            assert dequantize.inputs[0] is not None
            table = new_initializer(model.graph, f"{dequantize.inputs[0].name}.values", values)
            for gather in look_ups:
                gather.replace_input_with(0, table)
                gather.metadata_props.update(dequantize.metadata_props)
            remove_unread(model.graph, dequantize)
            modified = True
        return ir.passes.PassResult(model, modified)
