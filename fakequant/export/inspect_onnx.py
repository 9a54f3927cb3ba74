"""What ONNX Runtime CPU makes of each op of a Q/DQ file: an integer kernel, or floats and why."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from fakequant.export.graph import MODULE_KEY
from fakequant.export.kernels import KERNELS, ONNXRUNTIME_DOMAIN
from fakequant.export.load import load_model
from fakequant.export.match_kernels import OptimizedGraph
from fakequant.export.quantized_edges import dequantizer_of, merge_equal_quantizers
from fakequant.export.reasons import reasons_for

FOLDED = "folded"
"""In place of a kernel: the op was merged into another or computed beforehand."""

_UNKNOWN = "no integer kernel, reason unknown"


@dataclasses.dataclass(frozen=True)
class InspectedOp:
    """One op of the file, and what runs it.

    Args:
        name: of the node.
        module: full name of the torch module that it comes from; empty if the file does not say.
        op_type: of ONNX.
        kernel: op type in the optimized graph, or ``"folded"``.
        is_integer: whether that computes in integers.
        has_qdq: whether a DequantizeLinear makes one of its inputs.
        reason: why not in integers, all that is known; empty if it is, was folded, or has no Q/DQ.
    """

    name: str
    module: str
    op_type: str
    kernel: str
    is_integer: bool
    has_qdq: bool
    reason: str

    def __str__(self) -> str:
        """Return one line."""
        where = f"{self.module} ({self.op_type})" if self.module else f"{self.op_type} {self.name}".rstrip()
        return f"{where} runs as {self.kernel}" + (f": {self.reason}" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class InspectReport:
    """The ops of one file in ONNX Runtime CPU.

    Args:
        path: the file.
        ops: convolutions, products, recurrent layers, Add, Mul, Concat, pools, ReduceMean, Softmax and Sigmoid, in
            order of the file.
    """

    path: Path
    ops: tuple[InspectedOp, ...]

    @property
    def integer_ops(self) -> tuple[InspectedOp, ...]:
        """Those that run as integer kernels."""
        return tuple(op for op in self.ops if op.is_integer)

    @property
    def float_with_qdq(self) -> tuple[InspectedOp, ...]:
        """Those that run in floats between Q and DQ: slower than without. Each has a reason."""
        return tuple(op for op in self.ops if op.reason)

    def __str__(self) -> str:
        """Return a line for each op type, then one for each op that runs in floats between Q and DQ."""
        lines = [f"{self.path} in ONNX Runtime CPU:"]
        lines += [f"  {_summary(op_type, ops)}" for op_type in KERNELS if (ops := self._of(op_type))]
        return "\n".join([*lines, *(f"  {op}" for op in self.float_with_qdq)])

    def _of(self, op_type: str) -> list[InspectedOp]:
        return [op for op in self.ops if op.op_type == op_type]


def inspect_onnx(path: str | os.PathLike[str]) -> InspectReport:
    """Let ONNX Runtime CPU optimize a file, and report which ops became integer kernels and why others did not.

    Args:
        path: of the file.

    Raises:
        ValidationError: it is no valid ONNX file, or ONNX Runtime cannot load it; names the file.
    """
    file = Path(path)
    model = load_model(file)
    optimized = OptimizedGraph(model, file)
    IdentityEliminationPass()(model)  # as ONNX Runtime does before it looks at Q and DQ
    merge_equal_quantizers(model.graph)
    domains = {"", ONNXRUNTIME_DOMAIN}
    nodes = [node for node in model.graph.all_nodes() if node.domain in domains and node.op_type in KERNELS]
    return InspectReport(file, tuple(_inspect(node, optimized) for node in nodes))


def _inspect(node: ir.Node, optimized: OptimizedGraph) -> InspectedOp:
    kernel, is_integer = optimized.kernel_of(node), optimized.is_integer(node)
    has_qdq = any(dequantizer_of(value) is not None for value in node.inputs)
    is_slow = has_qdq and kernel is not None and not is_integer
    return InspectedOp(
        name=node.name or "",
        module=node.metadata_props.get(MODULE_KEY, ""),
        op_type=node.op_type,
        kernel=FOLDED if kernel is None else kernel.op_type,
        is_integer=is_integer,
        has_qdq=has_qdq,
        reason="; ".join(reasons_for(node)) or _UNKNOWN if is_slow else "",
    )


def _summary(op_type: str, ops: Iterable[InspectedOp]) -> str:
    all_ops = list(ops)
    integer, slow = (
        sum(map(bool, flags)) for flags in zip(*((op.is_integer, op.reason) for op in all_ops), strict=True)
    )
    folded = sum(op.kernel == FOLDED for op in all_ops)
    rest = {"in floats between Q and DQ": slow, "folded": folded, "in floats": len(all_ops) - integer - slow - folded}
    words = [f"{count} {what}" for what, count in rest.items() if count]
    return ", ".join([f"{integer} of {len(all_ops)} {op_type} run as integers", *words])
