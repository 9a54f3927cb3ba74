"""What a target refuses, computes wrongly or runs slowly: one check a rule, grouped by subject.

==============  ===================================================================
check           the decorator, findings, the registry
view            a model as checks read it: nodes, constants, quantizers
paths           ways through a graph: what is quantized, what is fused
zero_points     R1, R6
scales          R4, R5, R7 to R9
codes           R2, R3, R10, R11
operators       R12, R17, R46, R48
weights         R14 to R16, 1c
layers          R20, R30, R43, R44
residual_adds   R33
sharing         R34, R36, R37, 1f
placement       R32, R35, R38, R41
attention       R42
cuda            C1 to C5, ONNX Runtime's CUDA provider
==============  ===================================================================

The rules are numbered as in docs/placement.md, which has those of placement; the
docstring of each check says where its rule comes from. 1c is the table of channel axes,
1f a Q that is not one of a pair. None of them was measured on TensorRT or a GPU by us.
"""

from fakequant.export.checks import (
    attention,
    codes,
    cuda,
    layers,
    operators,
    placement,
    residual_adds,
    scales,
    sharing,
    weights,
    zero_points,
)
from fakequant.export.checks.check import Check, Finding, Severity, checks_for
from fakequant.export.checks.view import View

__all__ = [
    "Check",
    "Finding",
    "Severity",
    "View",
    "attention",
    "checks_for",
    "codes",
    "cuda",
    "layers",
    "operators",
    "placement",
    "residual_adds",
    "scales",
    "sharing",
    "weights",
    "zero_points",
]
