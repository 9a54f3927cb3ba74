"""Zero points: TensorRT is symmetric."""

from collections.abc import Iterator

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.view import View

_SMALL_FLOATS = "FLOAT"
"""The parser does not look at the zero point of FP8 and FP4."""


@check("R1", Severity.ERROR, "Quantize symmetrically, with zero point 0")
def nonzero_zero_point(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt QuantDequantLinearHelper, shiftIsAllZeros; NvInfer.h IQuantizeLayer."""
    for quantizer in view.grids:
        zeros = quantizer.zero_point
        if zeros is None or (quantizer.codes is not None and quantizer.codes.name.startswith(_SMALL_FLOATS)):
            continue
        wrong = zeros[zeros != 0]
        if wrong.size:
            yield quantizer.node, f"expected zero point 0, got {wrong[0]} ({wrong.size} of {zeros.size} are not 0)"


@check("R1", Severity.ERROR, "Store the zero point as an initializer")
def computed_zero_point(view: View) -> Iterator[Fault]:
    """Source: NvInfer.h: only Constant, or Constant and Cast, may lead to a zero point."""
    for quantizer in view.grids:
        value = quantizer.zero_point_value
        if value is not None and quantizer.zero_point is None:
            yield quantizer.node, f"expected a constant zero point, got {value.name}, which is computed"


@check("R6", Severity.ERROR, "Give the zero point the shape of the scale")
def zero_point_of_another_size(view: View) -> Iterator[Fault]:
    """Source: onnx-tensorrt compares the volumes; a scalar may stand beside [1]."""
    for quantizer in view.grids:
        scale, zeros = quantizer.scale, quantizer.zero_point
        if scale is not None and zeros is not None and scale.size != zeros.size:
            yield (
                quantizer.node,
                f"expected as many zero points as scales, got {list(zeros.shape)} and {list(scale.shape)}",
            )


@check("R6", Severity.ERROR, "Add a zero point of type int8")
def quantize_without_a_type(view: View) -> Iterator[Fault]:
    """Source: without one ONNX means uint8, and TensorRT takes int8: half of the range is lost."""
    for quantizer in view.quantizers:
        if quantizer.is_untyped:
            yield quantizer.node, "expected a zero point, got none: ONNX then means uint8, TensorRT int8"
