"""Layers that are too small to gain from integers on a GPU: rules R43 and R44."""

import math

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call

_LEAST = 16
"""Least rows, columns and channels that a tensor core tile fills."""


def too_small(call: Call) -> str:
    """Return why a weighted call gains nothing from integers, "" if it may gain."""
    data, weight = call.operand(0), call.operand(1)
    if data is None or weight is None:
        return ""
    if call.kind.startswith("conv"):
        return _convolution(call)
    if call.role is Role.PRODUCT:
        inner, columns = data.shape[-1], weight.shape[-1]
    else:
        columns, inner = weight.shape[0], math.prod(weight.shape[1:])
    if columns == 1:
        return "a matrix-vector product"
    if inner < _LEAST or columns < _LEAST:
        return f"{inner} inputs, {columns} outputs: fewer than {_LEAST}"
    return ""


def _convolution(call: Call) -> str:
    data, weight = call.operand(0), call.operand(1)
    assert data is not None
    assert weight is not None
    kernel = weight.shape[2:]
    channels = data.shape[-len(kernel) - 1]
    if call.kind.startswith("conv_transpose"):
        outputs = call.output.shape[-len(kernel) - 1]
        groups = outputs // max(weight.shape[1], 1)
        inputs = channels // max(groups, 1)
    else:
        inputs, groups = weight.shape[1], channels // max(weight.shape[1], 1)
        outputs = weight.shape[0]
    if inputs >= _LEAST and outputs >= _LEAST:
        return ""
    if groups > 1 and outputs % 8 == 0 and min(kernel) >= 3:
        return ""
    is_first = data.producer is None
    aligned = inputs % 8 == 0 or outputs % 8 == 0
    if groups == 1 and aligned and (is_first or max(inputs, outputs) >= _LEAST) and len(set(kernel)) == 1:
        return ""
    shape = "x".join(map(str, kernel))
    return f"{inputs} input channels a group, {outputs} outputs, kernel {shape}: too few for integer kernels"
