"""Drop what names the user's machine.

torch.onnx writes stack traces and fx nodes into the file; they hold local paths and can
outweigh a small model. fakequant's own keys stay.
"""

from collections.abc import Iterator

import onnx_ir as ir

_OURS = "fakequant."


class DropMetadata(ir.passes.InPlacePass):
    """Removes every metadata entry and doc string that is not fakequant's."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove."""
        modified = False
        for part in _parts(model):
            foreign = [key for key in part.metadata_props if not key.startswith(_OURS)]
            modified |= bool(foreign) or bool(part.doc_string)
            for key in foreign:
                del part.metadata_props[key]
            part.doc_string = None
        return ir.passes.PassResult(model, modified)


def _parts(model: ir.Model) -> Iterator[ir.Model | ir.Graph | ir.Node | ir.Value]:
    yield model
    yield model.graph
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield node
        yield from node.outputs
