"""What an exported file holds, and what it does not, in words."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from fakequant.export.graph import (
    FLOAT_DTYPE_KEY,
    MODULE_KEY,
    QUANTIZER_KEY,
    constant_of,
    is_dequantized,
    weight_dequantizers,
)
from fakequant.export.kernels import INTEGER_FORMS, RECURRENT, WEIGHTED
from fakequant.export.rules.float_dtype import FloatDtype
from fakequant.export.rules.fold_batchnorm import FoldBatchNorm
from fakequant.export.rules.gather_codes import CODES
from fakequant.nn.modules.recurrent import RUNS_IN_FLOAT


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """The contents of one file.

    Args:
        path: where it is.
        target: for which runtime.
        opset: its ONNX opset.
        float_dtype: its float type.
        size: in bytes, external data included.
        quantizers: names of the quantizers in it.
        not_in_file: enabled quantizers of the model that no output of the exported forward depends on.
        integer_weights: how many weights are stored as integers.
        folded_batchnorms: how many were folded into weights.
        float_ops: weighted ops without Q/DQ on both inputs, and recurrent ones, {node: reason}.
        kept_batchnorms: BatchNormalization nodes behind a convolution that stayed, {node: reason}.
        float32_layers: where that is another type, modules with something that stays float32, {module: reason}.
        clamped_constants: modules with a constant that the type does not hold, {module: what became of it}.
    """

    path: Path
    target: str
    opset: int
    float_dtype: str
    size: int
    quantizers: tuple[str, ...]
    not_in_file: tuple[str, ...]
    integer_weights: int
    folded_batchnorms: int
    float_ops: dict[str, str]
    kept_batchnorms: dict[str, str]
    float32_layers: dict[str, str]
    clamped_constants: dict[str, str]

    def __str__(self) -> str:
        """Return the report as lines of text."""
        lines = [
            f"{self.path}: target {self.target}, opset {self.opset}, {self.float_dtype}, {self.size / 1e6:.2f} MB",
            f"{len(self.quantizers)} quantizers, {self.integer_weights} integer weights, "
            f"{self.folded_batchnorms} BatchNorms folded",
        ]
        lines += [f"  not in the file (no output depends on it): {name}" for name in self.not_in_file]
        lines += [f"  float: {name}: {reason}" for name, reason in self.float_ops.items()]
        lines += [f"  BatchNorm kept: {name}: {reason}" for name, reason in self.kept_batchnorms.items()]
        lines += [f"  stays float32: {name}: {reason}" for name, reason in self.float32_layers.items()]
        lines += [f"  constant clamped: {name}: {change}" for name, change in self.clamped_constants.items()]
        return "\n".join(lines)


def describe(
    model: ir.Model,
    path: Path,
    size: int,
    target: str,
    rewrites: tuple[ir.passes.InPlacePass, ...],
    quantizers: Collection[str],
    called: Collection[str],
) -> ExportReport:
    """Return the report on a written file. Of the enabled quantizers, those called are in it."""
    folds = [rewrite for rewrite in rewrites if isinstance(rewrite, FoldBatchNorm)]
    floats = [rewrite for rewrite in rewrites if isinstance(rewrite, FloatDtype)]
    return ExportReport(
        path=path,
        target=target,
        opset=model.opset_imports[""],
        float_dtype=model.metadata_props.get(FLOAT_DTYPE_KEY, "float32"),
        size=size,
        quantizers=tuple(name for name in quantizers if name in called),
        not_in_file=tuple(name for name in quantizers if name not in called),
        integer_weights=_integer_weights(model.graph),
        folded_batchnorms=sum(fold.folded for fold in folds),
        float_ops=_float_ops(model.graph),
        kept_batchnorms={name: reason for fold in folds for name, reason in fold.skipped.items()},
        float32_layers={name: reason for change in floats for name, reason in change.float32_layers.items()},
        clamped_constants={name: text for change in floats for name, text in change.clamped_constants.items()},
    )


def _integer_weights(graph: ir.Graph) -> int:
    stored = {weight for _, weight in weight_dequantizers(graph) if weight.dtype != ir.DataType.INT32}  # of biases
    tables = (node.inputs[0] for node in graph.all_nodes() if node.op_type == "Gather")
    stored |= {table for table in tables if table is not None and table.is_initializer() and table.dtype in CODES}
    for node in graph.all_nodes():
        if node.op_type in INTEGER_FORMS:
            operands = node.inputs[1 : 3 if node.op_type == "DynamicQuantizeLSTM" else 2]
            stored |= {value for value in operands if value is not None and constant_of(value) is not None}
    return len(stored)


def _float_ops(graph: ir.Graph) -> dict[str, str]:
    found = {}
    for node in graph.all_nodes():
        reason = _why_float(node)
        if reason:
            name = f"{node.metadata_props.get(MODULE_KEY, node.name)} ({node.op_type})"
            name = f"{name} {node.name}" if name in found else name
            found[name] = reason
    return found


def _why_float(node: ir.Node) -> str:
    if node.op_type in RECURRENT:
        on_grids = "; its weights are floats on their grids" if QUANTIZER_KEY in node.metadata_props else ""
        return f"{RUNS_IN_FLOAT}{on_grids}"
    bare = [i for i in (0, 1) if not is_dequantized(node.inputs[i])] if node.op_type in WEIGHTED else []
    words = (("its data", "its weight or second input")[i] for i in bare)
    return f"no Q/DQ on {' and '.join(words)}" if bare else ""
