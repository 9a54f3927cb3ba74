"""ONNX Runtime's CUDA provider: what it computes wrongly, and what it leaves to the CPU.

It runs Q, DQ and float ops one by one, so where quantizers stand costs no fusion here, and
nothing of the rules of placement applies.
"""

from collections.abc import Iterator

import onnx_ir as ir

from fakequant.export.checks.check import Fault, Severity, check
from fakequant.export.checks.operators import full_name, is_integer
from fakequant.export.checks.scales import misfit_along
from fakequant.export.checks.view import PAIR, View

_TARGETS = ("onnxruntime-cuda",)
_NEWEST_OPSET = 22
"""Q and DQ have kernels for 21, which hold until ONNX changed them in 23."""

_INT4 = frozenset({ir.DataType.INT4, ir.DataType.UINT4})
_TYPES = _INT4 | {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2}
"""Codes that the kernels take."""


@check("C1", Severity.WARNING, "Export with opset 19 to 21", _TARGETS)
def newer_than_the_kernels(view: View) -> Iterator[Fault]:
    """Source: quantize_linear.cc of the provider, "21+", which matches 21 and 22 only. Once for a file."""
    pairs, opset = list(view.nodes(*PAIR)), _opset(view)
    if pairs and opset > _NEWEST_OPSET:
        yield pairs[0], f"expected opset up to {_NEWEST_OPSET}, got {opset}: all {len(pairs)} Q and DQ run on the CPU"


def _opset(view: View) -> int:
    return view.graph.opset_imports.get("", 0)


@check(
    "C2", Severity.WARNING, "Export QuantizeLinear and DequantizeLinear of the ONNX standard around float ops", _TARGETS
)
def integer_operator_on_the_cpu(view: View) -> Iterator[Fault]:
    """Source: docs/OperatorKernels.md: QLinearConv and its like have kernels for the CPU only."""
    for node in view.all_nodes:
        if is_integer(node):
            yield node, f"expected a float op between Q and DQ, got {full_name(node)}, which runs on the CPU"


@check("C3", Severity.ERROR, "Give one scale for each channel of the axis", _TARGETS)
def scale_does_not_fit_the_axis(view: View) -> Iterator[Fault]:
    """Source: the ONNX standard; without the attribute the axis is 1."""
    for quantizer in view.grids:
        if quantizer.is_per_tensor or quantizer.is_blocked or quantizer.scale is None:
            continue
        axis = 1 if quantizer.axis is None else quantizer.axis
        if problem := misfit_along(axis, quantizer.data.shape, quantizer.scale):
            yield quantizer.node, problem


@check("C4", Severity.WARNING, "Quantize to int8, and leave a bias in floats", _TARGETS)
def codes_without_a_kernel(view: View) -> Iterator[Fault]:
    """Source: quantize_linear.cc of the provider: 16- and 32-bit codes have kernels for the CPU only."""
    for quantizer in view.quantizers:
        if quantizer.codes is not None and quantizer.codes not in _TYPES:
            yield quantizer.node, f"expected 4- or 8-bit codes, got {quantizer.codes}, which runs on the CPU"


@check("C5", Severity.ERROR, "Set session.disable_quant_qdq to 1, which folds weights at load, or use 8 bits", _TARGETS)
def four_bits_without_blocks(view: View) -> Iterator[Fault]:
    """Source: quantize_linear.cc of the provider takes such a node and then raises "Unsupported quantization type"."""
    for quantizer in view.grids if _opset(view) <= _NEWEST_OPSET else ():
        if quantizer.codes in _INT4 and quantizer.scale is not None and not quantizer.is_blocked:
            scales = "one scale" if quantizer.is_per_tensor else f"{quantizer.scale.size} scales, one a channel"
            yield quantizer.node, f"expected blocks of {quantizer.codes}, got {scales}: the node fails when it runs"
