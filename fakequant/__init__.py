"""Fake quantization, calibration, QAT and Q/DQ ONNX export for PyTorch models.

Importing this loads torch but not onnx: ``export_onnx``, ``check_onnx``,
``inspect_onnx``, ``validate_onnx`` and ``compare`` load it when they are first used.
"""

from typing import TYPE_CHECKING, Any

from fakequant import calib, nn, quant_modules, tensor_quant
from fakequant.amax_file import load_amax, save_amax
from fakequant.calibration import Calibration, calibrate
from fakequant.call_sites import register_op
from fakequant.checkpoint import load_quantized, manifest_of, quantize_like, save_quantized
from fakequant.conversion_report import ConversionReport, EdgeReport, LayerReport
from fakequant.convert import dequantize, quantize
from fakequant.descriptor import QuantDescriptor
from fakequant.distributed import Processes
from fakequant.errors import (
    CalibrationError,
    CheckpointError,
    ExportError,
    FakeQuantError,
    InvalidTypeError,
    InvalidValueError,
    MissingDependencyError,
    RecipeError,
    ValidationError,
)
from fakequant.integer_state import IntegerState, IntegerTensor, integer_state
from fakequant.nn import TensorQuantizer
from fakequant.plan import Plan, plan
from fakequant.presets import preset
from fakequant.qat import (
    follow_ranges,
    freeze_batchnorm,
    freeze_ranges,
    quantize_gradients,
    unfreeze_batchnorm,
)
from fakequant.quant_modules import deactivate, enable_onnx_export, initialize, patched_torch_nn
from fakequant.recipe import Grid, Recipe, Rule
from fakequant.recipe_file import load_recipe, parse_recipe
from fakequant.retarget import retarget
from fakequant.summary import print_quant_summary, quant_summary

if TYPE_CHECKING:
    from fakequant.export import check_onnx, compare, export_onnx, inspect_onnx, validate_onnx

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "ConversionReport",
    "EdgeReport",
    "ExportError",
    "FakeQuantError",
    "Grid",
    "IntegerState",
    "IntegerTensor",
    "InvalidTypeError",
    "InvalidValueError",
    "LayerReport",
    "MissingDependencyError",
    "Plan",
    "Processes",
    "QuantDescriptor",
    "Recipe",
    "RecipeError",
    "Rule",
    "TensorQuantizer",
    "ValidationError",
    "calib",
    "calibrate",
    "check_onnx",
    "compare",
    "deactivate",
    "dequantize",
    "enable_onnx_export",
    "export_onnx",
    "follow_ranges",
    "freeze_batchnorm",
    "freeze_ranges",
    "initialize",
    "inspect_onnx",
    "integer_state",
    "load_amax",
    "load_quantized",
    "load_recipe",
    "manifest_of",
    "nn",
    "parse_recipe",
    "patched_torch_nn",
    "plan",
    "preset",
    "print_quant_summary",
    "quant_modules",
    "quant_summary",
    "quantize",
    "quantize_gradients",
    "quantize_like",
    "register_op",
    "retarget",
    "save_amax",
    "save_quantized",
    "tensor_quant",
    "unfreeze_batchnorm",
    "validate_onnx",
]

_FROM_EXPORT = frozenset({"check_onnx", "compare", "export_onnx", "inspect_onnx", "validate_onnx"})


def __getattr__(name: str) -> Any:
    """Load the ONNX side when one of its names is first used."""
    if name in _FROM_EXPORT:
        from fakequant import export

        return getattr(export, name)
    raise AttributeError(f"module 'fakequant' has no attribute {name!r}")
