"""Types of codes, and the types that Q and DQ say they make."""

import math
from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.view import FLOATS, FOUR_BITS, View
from fakequant.export.graph import produced_by

_TYPES = frozenset(
    {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1, ir.DataType.INT32}
)
"""What Q and DQ may have; INT32 is rule R3."""


@check("R2", Severity.ERROR, "Quantize to int8, with zero point 0")
def unknown_codes(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt refuses other types or, for a uint8 zero point, takes int8 without a word."""
    for quantizer in view.quantizers:
        follows = not quantizer.is_quantize and produced_by(quantizer.data, "QuantizeLinear") is not None
        if quantizer.codes is None or quantizer.codes in _TYPES or follows or quantizer.is_untyped:
            continue
        part = "codes" if quantizer.is_quantize else "data"
        yield quantizer.node, f"expected {part} of int8, int4, float8e4m3fn or float4e2m1, got {quantizer.codes}"


@check("R3", Severity.ERROR, "Store the bias as floats, without DequantizeLinear", targets=("tensorrt",))
def int32_dequantized(view: View) -> Iterator[Fault]:
    """Source: IDequantizeLayer takes Int8, FP8, Int4 and FP4 only (onnxruntime#14229, onnx-tensorrt#850).

    ONNX Runtime folds such a bias before it hands the graph to TensorRT.
    """
    for quantizer in view.quantizers:
        if quantizer.codes == ir.DataType.INT32:
            yield quantizer.node, f"expected a float bias, got {quantizer.data.name} of int32 behind DequantizeLinear"


@check("R10", Severity.ERROR, "Leave a tensor with an odd number of elements in int8 or float")
def odd_number_of_four_bits(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt packs two elements a byte."""
    for quantizer in view.grids:
        shape = quantizer.data.shape
        if quantizer.codes in FOUR_BITS and shape is not None and shape.is_static() and math.prod(shape.numpy()) % 2:
            yield quantizer.node, f"expected an even number of {quantizer.codes}, got the shape {list(shape)}"


@check("R11", Severity.ERROR, "Leave output_dtype out, or make it the type of the zero point (Q) or of the scale (DQ)")
def contradicting_output_type(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt, QuantizeLinear since opset 21, DequantizeLinear since 23."""
    for quantizer in view.quantizers:
        if not quantizer.output_dtype:
            continue
        dtype = ir.DataType(quantizer.output_dtype)
        if not quantizer.is_quantize:
            expected, fits = "a float type", dtype in FLOATS
        else:
            expected, fits = str(quantizer.codes), dtype == quantizer.codes
        if not fits:
            yield quantizer.node, f"expected output_dtype to be {expected}, got {dtype}"
