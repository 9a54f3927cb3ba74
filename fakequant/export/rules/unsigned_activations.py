"""Store activations as uint8: int8 codes with zero point z become uint8 codes with zero point z + 128.

The values are the same bit for bit. ONNX Runtime's fast kernels on x86 multiply uint8
activations by int8 weights, and it converts int8 activations by itself only where one
reader follows.
"""

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import constant_of, new_initializer

_ZERO = 128


class UnsignedActivations(ir.passes.InPlacePass):
    """Rewrites every int8 QuantizeLinear of a tensor that is no constant, and the DequantizeLinear behind it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite; weights are stored as codes already and have no Q."""
        nodes = [n for n in model.graph if n.op_type == "QuantizeLinear" and n.outputs[0].dtype == ir.DataType.INT8]
        for node in nodes:
            scale, zeros = node.inputs[1], constant_of(node.inputs[2])
            assert scale is not None
            assert zeros is not None
            zero_point = (zeros.astype(np.int16) + _ZERO).astype(np.uint8)
            value = new_initializer(model.graph, f"{scale.name}.zero_point", zero_point)
            for pair in (node, *node.outputs[0].consumers()):
                pair.replace_input_with(2, value)
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        return ir.passes.PassResult(model, modified=bool(nodes))
