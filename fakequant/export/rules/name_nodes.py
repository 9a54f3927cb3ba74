"""Name every node after its torch module, and Q and DQ after their quantizer.

torch.onnx knows the module that each node was traced in. This runs on the graph as
traced: its optimizer merges equal nodes and forgets who they belonged to.
"""

import ast
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class NameNodes(ir.passes.InPlacePass):
    """Writes module, quantizer and call into the metadata; Q and DQ nodes and their outputs get readable names.

    Args:
        names: path of a quantizer -> its name, for those that several modules share; torch traces the path of the call.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self._names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name; every model is modified."""
        calls: Counter[tuple[str, str]] = Counter()
        for node in model.graph.all_nodes():
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "['']"))
            path = scopes[-2] if len(scopes) > 1 else ""
            module = self._names.get(path, path)
            if module:
                node.metadata_props[MODULE_KEY] = module
            if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and module:
                call = calls[module, node.op_type]
                calls[module, node.op_type] += 1
                node.metadata_props[QUANTIZER_KEY] = module
                node.metadata_props[CALL_KEY] = str(call)
                node.name = f"{module}.{node.op_type}" + (f".{call + 1}" if call else "")
                if not node.outputs[0].is_graph_output():
                    node.outputs[0].name = f"{node.name}.output"
        return ir.passes.PassResult(model, modified=True)
