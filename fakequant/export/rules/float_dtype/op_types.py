"""Which types ONNX lets the inputs and outputs of an op have."""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir


class OpTypes:
    """The op definitions of some opsets. An op that ONNX does not define has no float type but float32.

    Args:
        opsets: {domain: version}.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = opsets

    def takes(self, node: ir.Node, index: int, dtype: ir.DataType) -> bool:
        """Whether an input may have a type."""
        schema = self._schema(node)
        return schema is not None and _has(schema.inputs, index, dtype)

    def gives(self, node: ir.Node, index: int, dtype: ir.DataType) -> bool:
        """Whether an output may have a type."""
        schema = self._schema(node)
        return schema is not None and _has(schema.outputs, index, dtype)

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        version = self._opsets.get(node.domain, 0)
        if not onnx.defs.has(node.op_type, version, node.domain):
            return None
        return onnx.defs.get_schema(node.op_type, version, node.domain)


def _has(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int, dtype: ir.DataType) -> bool:
    # The last formal stands for all that follow it.
    tensor = f"tensor({dtype.name.lower()})"
    return any(tensor in allowed for allowed in formals[min(index, len(formals) - 1)].types)
