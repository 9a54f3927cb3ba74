"""From a quantized torch model to a Q/DQ ONNX file: trace, rewrite for the target, check, write.

The file appears whole or not at all: it is written under a temporary name in the same
folder, checked there, and renamed.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from fakequant.errors import ExportError, InvalidTypeError, InvalidValueError
from fakequant.export.export_report import ExportReport, describe
from fakequant.export.rules.float_weights import FloatWeights
from fakequant.export.rules.name_nodes import NameNodes
from fakequant.export.targets import Target, target_named
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers

MIN_OPSET, MAX_OPSET = 18, 21
_EXTERNAL_DATA_ABOVE = 2**31 - 2**27
"""Bytes of tensors from which on they go to a second file: a protobuf ends at 2 GiB."""


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
) -> ExportReport:
    """Write a quantized model as an ONNX file with standard QuantizeLinear and DequantizeLinear.

    The model is exported in eval mode and left as it was.

    Args:
        model: calibrated; any module with TensorQuantizers.
        args: example inputs, as a tuple.
        path: of the file. Tensors beyond 2 GiB go to ``<path>.data`` beside it.
        target: ``"tensorrt"``.
        weights: ``"int8"`` stores codes with a DQ only (a quarter of the size; TensorRT 10 and
            later, ONNX Runtime); ``"float"`` stores floats with Q and DQ (TensorRT 8 and 9).
        opset: 18 to 21; by default the target's.
        dynamic_shapes: as for torch.export, such as ``({0: torch.export.Dim("batch")},)``.
        input_names: of the graph.
        output_names: of the graph.

    Returns:
        What the file holds: quantizers, folded layers, and what is not in it and why.

    Raises:
        ExportError: an enabled quantizer is not calibrated or still calibrating (all are named); torch
            cannot export the model; the checker refuses the result. No file is written.
        InvalidValueError: unknown target, weights or opset.
        InvalidTypeError: args is no tuple, or model no module.
    """
    chosen = target_named(target)
    _check_arguments(model, args, weights, opset)
    _check_calibrated(model)
    graph_model = _trace(model, args, opset or chosen.default_opset, dynamic_shapes, input_names, output_names)
    passes = _rewrite(graph_model, chosen, weights)
    _write(graph_model, Path(path))
    return describe(graph_model, Path(path), chosen.name, passes, dict(named_quantizers(model)))


def _check_arguments(model: object, args: object, weights: str, opset: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise InvalidTypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}")
    if weights not in {"int8", "float"}:
        raise InvalidValueError(f"weights: expected 'int8' or 'float', got {weights!r}")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidValueError(f"opset: expected {MIN_OPSET} to {MAX_OPSET}, got {opset}")


def _check_calibrated(model: nn.Module) -> None:
    enabled = {name: q for name, q in named_quantizers(model) if q.is_enabled}
    if unknown := [name for name, q in enabled.items() if not q.is_calibrated]:
        raise ExportError(
            f"{len(unknown)} of {len(enabled)} quantizers are not calibrated: {', '.join(unknown)}. "
            "Call fakequant.calibrate, or disable() those that should stay float"
        )
    if codes := [name for name, q in enabled.items() if not q.fake_quant]:
        raise ExportError(f"expected quantizers with fake_quant=True, got codes from {', '.join(codes)}")


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    opset: int,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    with evaluating(model), warnings.catch_warnings():
        # torch warns about its own internals here; what matters to the user is checked below.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch.onnx.export failed for {type(model).__name__}: {error}") from error
    assert program is not None
    return program.model


def _rewrite(model: ir.Model, target: Target, weights: str) -> tuple[ir.passes.InPlacePass, ...]:
    rewrites = target.rewrites()
    NameNodes()(model)
    for rewrite in rewrites:
        rewrite(model)
    RemoveUnusedNodesPass()(model)
    if weights == "float":
        FloatWeights()(model)
        RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "fakequant", None
    model.ir_version = 10 if model.opset_imports[""] >= 21 else 9
    return rewrites


def _write(model: ir.Model, path: Path) -> None:
    if not path.parent.is_dir():
        raise ExportError(f"path: expected an existing folder, got {path.parent}")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{path.name}.data" if size > _EXTERNAL_DATA_ABOVE else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        ir.save(model, temporary, external_data=data_name)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
        if data_name is not None:
            (Path(folder) / data_name).replace(path.parent / data_name)
        temporary.replace(path)
