"""From a quantized torch model to a Q/DQ ONNX file: trace, rewrite for the target, check, write.

The file appears whole or not at all: it is written under a temporary name in the same
folder, checked there, and renamed.
"""

import os
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn

from fakequant.call_sites import TRANSLATIONS
from fakequant.errors import ExportError, InvalidTypeError, InvalidValueError
from fakequant.export.export_report import ExportReport, describe
from fakequant.export.graph import MODULE_KEY, QUANTIZER_KEY, TARGET_KEY
from fakequant.export.rules.drop_metadata import DropMetadata
from fakequant.export.rules.float_weights import FloatWeights
from fakequant.export.rules.merge_quantizers import MergeQuantizers
from fakequant.export.rules.name_nodes import NameNodes
from fakequant.export.rules.name_scales import NameScales
from fakequant.export.targets import Target, target_named
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers, quantizer_paths, weights_of_quantizers
from fakequant.onnx_ops import channel_axis
from fakequant.retarget import targeted

MIN_OPSET, MAX_OPSET = 18, 21
_EXTERNAL_DATA_ABOVE = 2**31 - 2**27
"""Bytes of tensors from which on they go to a second file: a protobuf ends at 2 GiB."""

_KEPT = frozenset({"Clip", "DequantizeLinear", "Max", "Min", "QuantizeLinear"})
"""What a quantizer leaves in the graph; the rest of it computes its scale."""


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
        target: ``"tensorrt"`` or ``"onnxruntime"``.
        weights: ``"int8"`` stores codes with a DQ only (a quarter of the size; TensorRT 10 and
            later, ONNX Runtime); ``"float"`` stores floats with Q and DQ (TensorRT 8 and 9).
        opset: 18 to 21; by default the target's.
        dynamic_shapes: as for torch.export, such as ``({0: torch.export.Dim("batch")},)``.
        input_names: of the graph.
        output_names: of the graph.

    Returns:
        What the file holds: quantizers, folded layers, and what is not in it and why.

    Raises:
        ExportError: an enabled quantizer is not calibrated or still collects (all are named), or the opset
            has no type for its codes; a quantized weight is not float32; there is no such folder; torch
            cannot export the model; the checker refuses the result. No file is written.
        InvalidValueError: unknown target, weights or opset.
        InvalidTypeError: args is no tuple, or model no module.
    """
    chosen, file = target_named(target), Path(path)
    _check_arguments(model, args, weights, opset)
    version = opset or chosen.default_opset
    with targeted(model, target):
        quantizers = {name: quantizer for name, quantizer in named_quantizers(model) if quantizer.is_enabled}
        _check_not_calibrating(model)
        _check_quantizers(quantizers, version)
        _check_weights(model)
        if not file.parent.is_dir() or file.is_dir():
            raise ExportError(f"path: expected a file in an existing folder, got {file}")
        program = _trace(model, args, version, dynamic_shapes, input_names, output_names)
    NameNodes(quantizer_paths(model))(program.model)
    called = _called(program.model, quantizers)
    rewrites = _rewrite(program, chosen, weights, quantizers)
    size = _write(program.model, file)
    return describe(program.model, file, size, chosen.name, rewrites, quantizers, called)


def _check_arguments(model: object, args: object, weights: str, opset: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise InvalidTypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}")
    if weights not in {"int8", "float"}:
        raise InvalidValueError(f"weights: expected 'int8' or 'float', got {weights!r}")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidValueError(f"opset: expected {MIN_OPSET} to {MAX_OPSET}, got {opset}")


def _check_not_calibrating(model: nn.Module) -> None:
    if collecting := [name for name, q in named_quantizers(model) if q._if_calib and not q._disabled]:
        raise ExportError(
            f"expected no quantizer to collect statistics: call disable_calib() on {', '.join(collecting)}"
        )


def _check_quantizers(quantizers: Mapping[str, TensorQuantizer], opset: int) -> None:
    if unknown := [name for name, quantizer in quantizers.items() if not quantizer.is_calibrated]:
        raise ExportError(
            f"{len(unknown)} of {len(quantizers)} quantizers are not calibrated: {', '.join(unknown)}. "
            "Call fakequant.calibrate, or disable() those that should stay float"
        )
    if codes := [name for name, quantizer in quantizers.items() if not quantizer.fake_quant]:
        raise ExportError(f"expected quantizers with fake_quant=True, got codes from {', '.join(codes)}")
    for name, quantizer in quantizers.items():
        assert quantizer.scale is not None
        try:
            channel_axis(quantizer.scale)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from None
    needed = {name: _opset_of(quantizer.num_bits) for name, quantizer in quantizers.items()}
    if newer := [f"{name} ({quantizers[name].num_bits} bits: {n})" for name, n in needed.items() if n > opset]:
        raise ExportError(f"opset: expected {max(needed.values())} or later, got {opset}, for {', '.join(newer)}")


def _opset_of(num_bits: int | tuple[int, int]) -> int:
    """Return the first opset whose QuantizeLinear has a type for the codes."""
    if isinstance(num_bits, tuple):
        return 19
    return MIN_OPSET if num_bits <= 8 else 21


def _check_weights(model: nn.Module) -> None:
    names = {module: name for name, module in model.named_modules()}
    other = [
        f"{names[module]}.weight ({module.weight.dtype})".lstrip(".")
        for quantizer, module in weights_of_quantizers(model).items()
        if quantizer.is_enabled and module.weight.dtype != torch.float32
    ]
    if other:
        raise ExportError(
            f"expected float32 weights, got {', '.join(other)}. Export a copy made float by model.float(): "
            "the ranges stay, and the runtime chooses the precision of what is not quantized"
        )


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    opset: int,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> torch.onnx.ONNXProgram:
    with evaluating(model), warnings.catch_warnings():
        # torch warns about its own internals here; what matters to the user is checked below.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,  # type: ignore[arg-type]
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch raises its own types, unrelated to each other
            raise ExportError(f"torch.onnx.export failed for {type(model).__name__}: {error}") from error
    assert program is not None
    return program


def _rewrite(
    program: torch.onnx.ONNXProgram, target: Target, weights: str, quantizers: Collection[str]
) -> tuple[ir.passes.InPlacePass, ...]:
    rewrites = target.rewrites()
    _fold_scales(program.model, quantizers)
    # Before torch's optimizer, which merges equal nodes too and drops the names of all but one.
    MergeQuantizers()(program.model)
    program.optimize()
    model = program.model
    for rewrite in rewrites:
        rewrite(model)
    RemoveUnusedNodesPass()(model)
    if weights == "float":
        FloatWeights()(model)
        RemoveUnusedNodesPass()(model)
    NameScales()(model)
    DropMetadata()(model)
    model.metadata_props[TARGET_KEY] = target.name
    model.producer_name, model.producer_version = "fakequant", None
    model.ir_version = 10 if model.opset_imports[""] >= 21 else 9
    return rewrites


def _called(model: ir.Model, quantizers: Collection[str]) -> set[str]:
    """Return the quantizers that were traced; refuse a graph with their arithmetic in place of Q and DQ."""
    nodes = list(model.graph.all_nodes())
    called = {node.metadata_props.get(MODULE_KEY, "") for node in nodes} & set(quantizers)
    if lost := called - {node.metadata_props.get(QUANTIZER_KEY) for node in nodes}:
        raise ExportError(
            f"expected Q and DQ for every quantizer, got only their arithmetic for {', '.join(sorted(lost))}: "
            "torch.onnx captured the model in a way that hides the export from it"
        )
    return called


def _fold_scales(model: ir.Model, quantizers: Collection[str]) -> None:
    """Make constants of the scales, which are traced as computed from amax; torch's optimizer folds only small ones."""

    def is_of_scale(node: ir.Node) -> bool | None:
        return node.op_type not in _KEPT if node.metadata_props.get(MODULE_KEY) in quantizers else None

    optimizer.fold_constants(model, should_fold=is_of_scale)


def _write(model: ir.Model, path: Path) -> int:
    """Write the file, or the file and its data, and return their size in bytes."""
    held = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{path.name}.data" if held > _EXTERNAL_DATA_ABOVE else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        ir.save(model, temporary, external_data=data_name)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        if data_name is not None:
            (Path(folder) / data_name).replace(path.parent / data_name)
        temporary.replace(path)
    return size
