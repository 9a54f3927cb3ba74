"""Store weights as floats: integer initializer -> DQ becomes float initializer -> Q -> DQ.

TensorRT 8 and 9 need this form (rule R16). The floats are the dequantized codes, so Q
gives back the same codes, bit for bit.
"""

import functools

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import QUANTIZER_KEY, along_axis, axis_of, constant_of, new_initializer, weight_dequantizers


class FloatWeights(ir.passes.InPlacePass):
    """Puts a QuantizeLinear in front of the DequantizeLinear of every stored weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every stored weight."""
        modified = False
        for node, stored in list(weight_dequantizers(model.graph)):
            codes, scale = constant_of(stored), constant_of(node.inputs[1])
            if codes is None or scale is None:
                continue
            axis = axis_of(node, scale)
            values = functools.partial(_values, codes, along_axis(scale, axis, codes.ndim))
            # Lazy: one weight after the other is in memory as floats, while the file is written.
            lazy = ir.LazyTensor(values, ir.DataType.from_numpy(scale.dtype), ir.Shape(codes.shape))
            weight = new_initializer(model.graph, f"{stored.name}.values", lazy)
            attributes = {} if axis is None else {"axis": axis}
            quantize = ir.node("QuantizeLinear", [weight, *node.inputs[1:3]], attributes)
            quantize.name = (node.name or "weight").replace("DequantizeLinear", "QuantizeLinear")
            if QUANTIZER_KEY in node.metadata_props:
                quantize.metadata_props[QUANTIZER_KEY] = node.metadata_props[QUANTIZER_KEY]
            model.graph.insert_before(node, quantize)
            node.replace_input_with(0, quantize.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)


def _values(codes: NDArray[np.generic], scale: NDArray[np.generic]) -> ir.TensorProtocol:
    return ir.tensor(codes.astype(scale.dtype) * scale)
