"""Split constants: Split of an initializer becomes initializers.

Query, key and value of an attention each have a third of one weight. onnxscript's optimizer, which folds other
ops on constants, leaves those with several outputs; a quantizer behind one would see no constant to store.
"""

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import constant_of, new_initializer


class SplitConstants(ir.passes.InPlacePass):
    """Replaces every Split of a constant into parts of known or equal sizes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace."""
        nodes = [node for node in model.graph if node.op_type == "Split" and constant_of(node.inputs[0]) is not None]
        modified = [_split(model.graph, node) for node in nodes]
        return ir.passes.PassResult(model, modified=any(modified))


def _split(graph: ir.Graph, node: ir.Node) -> bool:
    data, axis = constant_of(node.inputs[0]), node.attributes.get_int("axis", 0)
    sizes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    is_output = any(output.is_graph_output() for output in node.outputs)
    if data is None or is_output or (sizes is None and data.shape[axis] % len(node.outputs)):
        return False
    ends = np.cumsum(sizes)[:-1] if sizes is not None else len(node.outputs)
    for output, part in zip(node.outputs, np.split(data, ends, axis), strict=True):
        constant = new_initializer(graph, str(output.name), part)
        ir.convenience.replace_all_uses_with(output, constant)
    graph.remove(node, safe=True)
    return True
