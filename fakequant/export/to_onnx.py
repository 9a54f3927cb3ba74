"""From a quantized torch model to a Q/DQ ONNX file: trace, rewrite for the target, write."""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn

from fakequant.arguments import check_module
from fakequant.errors import ExportError, InvalidTypeError, InvalidValueError
from fakequant.export.export_report import ExportReport, describe
from fakequant.export.exportable import check_not_calibrating, check_opset, check_quantizers, check_weights
from fakequant.export.folded_weights import folded_weights
from fakequant.export.graph import DOMAIN, TARGET_KEY
from fakequant.export.rules.drop_metadata import DropMetadata
from fakequant.export.rules.expand_quantizers import ExpandQuantizers
from fakequant.export.rules.float_dtype import float_rewrites
from fakequant.export.rules.float_weights import FloatWeights
from fakequant.export.rules.merge_quantizers import MergeQuantizers
from fakequant.export.rules.name_nodes import NameNodes
from fakequant.export.rules.name_scales import NameScales
from fakequant.export.rules.recurrent_weights import RecurrentWeights
from fakequant.export.rules.split_constants import SplitConstants
from fakequant.export.targets import Target, target_named
from fakequant.export.targets.accepts import check_accepted, opset_needed
from fakequant.export.trace import trace
from fakequant.export.weights_on_grids import weights_on_grids
from fakequant.export.write import write
from fakequant.nn.sharding import check_whole
from fakequant.nn.walk import named_quantizers
from fakequant.retarget import targeted

MIN_OPSET, MAX_OPSET = 13, 21

_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
"""By opset, as ONNX published them together; onnx's own default is newer than the runtimes accept."""


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause Python's cyclic garbage collector, which would look in vain through millions of objects of a trace."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_garbage_collection()
def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str = "tensorrt",
    weights: str = "int8",
    opset: int | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    float_dtype: str = "float32",
) -> ExportReport:
    """Write a quantized model as an ONNX file with standard QuantizeLinear and DequantizeLinear.

    The model is exported in eval mode and left as it was.

    Args:
        model: calibrated; any module with TensorQuantizers.
        args: example inputs, as a tuple.
        path: of the file. Tensors beyond 2 GiB go to ``<path>.data`` beside it.
        target: ``"tensorrt"``, ``"tensorrt-ep"``, ``"onnxruntime"`` or ``"onnxruntime-cuda"``.
        weights: ``"int8"`` stores codes with a DQ only (a quarter of the size; TensorRT 10 and
            later, ONNX Runtime); ``"float"`` stores floats with Q and DQ (TensorRT 8 and 9).
        opset: 13 to 21; by default the target's, or the first that holds every grid. Below 18 torch's
            TorchScript exporter traces the model.
        dynamic_shapes: as for torch.export, such as ``({0: torch.export.Dim("batch")},)``.
        input_names: of the graph.
        output_names: of the graph.
        float_dtype: of everything that is not codes, scales, inputs and outputs included: ``"float16"`` or
            ``"bfloat16"`` for the strongly typed graph of TensorRT 10 and 11. Layers that the type cannot
            hold stay float32; the report names them. Scales are rounded too: of the codes, about one in a
            hundred is a step beside torch's in float16, more in bfloat16. ONNX Runtime (1.31) gets the biases of
            such files wrong unless the session option ``optimization.disable_specified_optimizers`` is
            ``"WeightBiasQuantization"``; ``Session`` sets it.

    Returns:
        What the file holds: quantizers, folded layers, and what is not in it and why.

    Raises:
        ExportError: an enabled quantizer is not calibrated or still collects (all are named), or the opset or
            the target does not hold its grid; a quantized weight is not float32; there is no such folder; torch
            cannot export the model; the checker refuses the result. No file is written.
        InvalidValueError: unknown target, weights, opset or float_dtype, or a float_dtype that the target or
            opset has not.
        InvalidTypeError: args is no tuple, or model no module.
    """
    chosen, file = target_named(target), Path(path)
    _check_arguments(model, args, weights, opset)
    check_whole(model)
    with targeted(model, target), folded_weights(model):
        quantizers = {name: quantizer for name, quantizer in named_quantizers(model) if quantizer.is_enabled}
        needed = (opset_needed(quantizer.descriptor) for quantizer in quantizers.values())
        version = opset or max([chosen.default_opset, *needed])
        floats = float_rewrites(float_dtype, target, version)
        check_not_calibrating(model)
        check_quantizers(quantizers)
        check_weights(model)
        if not file.parent.is_dir() or file.is_dir():
            raise ExportError(f"path: expected a file in an existing folder, got {file}")
        with weights_on_grids(model, quantizers) as stored:
            graph = trace(
                model,
                args,
                quantizers,
                opset=version,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
            )
        traced = tuple(graph.graph.initializers.values())
        NameNodes()(graph)
        called = {node.attributes["name"].as_string() for node in graph.graph.all_nodes() if node.domain == DOMAIN}
        called |= stored
        graph = optimizer.optimize(graph)
        SplitConstants()(graph)
        expansion = ExpandQuantizers(quantizers)
        check_accepted(target, expansion.uses(graph))
        check_opset(quantizers, version)
        expansion(graph)
        RecurrentWeights(stored)(graph)
    rewrites = _rewrite(graph, chosen, weights, floats)
    size = write(graph, file)
    report = describe(graph, file, size, chosen.name, rewrites, quantizers, called)
    for value in (*traced, *graph.graph.initializers.values()):
        value.const_value = None  # onnxscript's rules hold on to the last graph, which holds the model's weights
    return report


def _check_arguments(model: object, args: object, weights: str, opset: int | None) -> None:
    check_module(model)
    if not isinstance(args, tuple):
        raise InvalidTypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}")
    if weights not in {"int8", "float"}:
        raise InvalidValueError(f"weights: expected 'int8' or 'float', got {weights!r}")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidValueError(f"opset: expected {MIN_OPSET} to {MAX_OPSET}, got {opset}")


def _rewrite(
    model: ir.Model, target: Target, weights: str, floats: tuple[ir.passes.InPlacePass, ...]
) -> tuple[ir.passes.InPlacePass, ...]:
    rewrites = (*target.rewrites(), *floats)
    for rewrite in (MergeQuantizers(), *rewrites, RemoveUnusedNodesPass()):
        rewrite(model)
    if weights == "float":
        FloatWeights()(model)
        RemoveUnusedNodesPass()(model)
    NameScales()(model)
    DropMetadata()(model)
    model.metadata_props[TARGET_KEY] = target.name
    model.producer_name, model.producer_version = "fakequant", None
    model.ir_version = _IR_VERSIONS[model.opset_imports[""]]
    return rewrites
