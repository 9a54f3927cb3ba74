"""Name every node after its torch module, and count the calls of each quantizer.

torch.onnx knows the module that each node was traced in. This runs on the graph as
traced: its optimizer merges equal nodes and forgets who they belonged to.
"""

import ast
from collections import Counter

import onnx_ir as ir

from fakequant.export.graph import CALL_KEY, DOMAIN, MODULE_KEY

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata: repr of the list of the modules that it was traced in, from the root on, and its own name."""


class NameNodes(ir.passes.InPlacePass):
    """Writes the module into the metadata of every node, and the call into those that stand for quantizers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name; every model is modified."""
        calls: Counter[str] = Counter()
        for node in model.graph.all_nodes():
            scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "['']"))
            if len(scopes) > 1 and scopes[-2]:
                node.metadata_props[MODULE_KEY] = scopes[-2]
            if node.domain == DOMAIN:
                name = node.attributes["name"].as_string()
                node.metadata_props[CALL_KEY] = str(calls[name])
                calls[name] += 1
        return ir.passes.PassResult(model, modified=True)
