"""Name Q and DQ after their quantizer, and every node's module, and drop what names the user's machine.

torch.onnx writes stack traces and fx nodes into the file; they name local paths and can
outweigh a small model. What a report needs of them is the module's name.
"""

import ast

import onnx_ir as ir

from fakequant.export.graph import MODULE_KEY, QUANTIZER_KEY

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class NameNodes(ir.passes.InPlacePass):
    """Replaces torch's metadata by module names; Q and DQ nodes and their outputs get their quantizer's name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename; every model is modified."""
        taken: set[str] = set()
        for node in model.graph.all_nodes():
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "['']"))
            module = scopes[-2] if len(scopes) > 1 else ""
            for key in [k for k in node.metadata_props if k.startswith("pkg.") or k == "namespace"]:
                del node.metadata_props[key]
            if module:
                node.metadata_props[MODULE_KEY] = module
            if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and module:
                node.metadata_props[QUANTIZER_KEY] = module
                node.name = _unique(f"{module}.{node.op_type}", taken)
                node.outputs[0].name = f"{node.name}.output"
                _name_scale(node, module, model.graph)
        return ir.passes.PassResult(model, modified=True)


def _name_scale(node: ir.Node, quantizer: str, graph: ir.Graph) -> None:
    """Name the constants of a Q or DQ; one that several nodes share keeps its first name."""
    for value, role in zip(node.inputs[1:], ("scale", "zero_point"), strict=False):
        if value is not None and value.is_initializer() and "." not in (value.name or ""):
            name = f"{quantizer}.{role}"
            if name not in graph.initializers:
                value.name = name


def _unique(name: str, taken: set[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}.{count}"
    taken.add(unique)
    return unique
