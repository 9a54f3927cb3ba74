"""Layers that are too small to gain from integers on a GPU: rules R43 and R44.

The formulas take plain numbers: placement asks them about torch calls, the checks of an
ONNX file about its nodes.
"""

import math
from collections.abc import Sequence

from fakequant.call_sites.ops import Role
from fakequant.call_sites.tensor_graph import Call, Value

_LEAST = 16
"""Least rows, columns and channels that a tensor core tile fills."""


def small_product(inputs: int, outputs: int) -> str:
    """Return why a product with a weight [inputs, outputs] gains nothing from integers, "" if it may gain (R43)."""
    if outputs == 1:
        return "a matrix-vector product"
    if inputs < _LEAST or outputs < _LEAST:
        return f"{inputs} inputs, {outputs} outputs: fewer than {_LEAST}"
    return ""


def small_convolution(inputs: int, outputs: int, groups: int, kernel: Sequence[int], *, is_first: bool) -> str:
    """Return why a convolution gains nothing from integers, "" if it may gain (R44).

    Args:
        inputs: channels of one group.
        outputs: channels of all groups.
        groups: number of groups.
        kernel: its sizes.
        is_first: it reads the model's input.
    """
    if inputs >= _LEAST and outputs >= _LEAST:
        return ""
    if groups > 1 and outputs % 8 == 0 and min(kernel) >= 3:
        return ""
    aligned = inputs % 8 == 0 or outputs % 8 == 0
    if groups == 1 and aligned and (is_first or max(inputs, outputs) >= _LEAST) and len(set(kernel)) == 1:
        return ""
    shape = "x".join(map(str, kernel))
    return f"{inputs} input channels a group, {outputs} outputs, kernel {shape}: too few for integer kernels"


def too_small(call: Call) -> str:
    """Return why a weighted call gains nothing from integers, "" if it may gain."""
    data, weight = call.operand(0), call.operand(1)
    if data is None or weight is None:
        return ""
    if call.kind.startswith("conv"):
        return _convolution(call, data, weight)
    if call.role is Role.PRODUCT:
        return small_product(data.shape[-1], weight.shape[-1])
    return small_product(math.prod(weight.shape[1:]), weight.shape[0])


def groups_of(call: Call) -> int:
    """Return the groups of a convolution, 1 for other calls; channels come before as many axes as its kernel has."""
    data, weight = call.operand(0), call.operand(1)
    if data is None or weight is None or not call.kind.startswith("conv"):
        return 1
    # A group of a transposed convolution has the outputs in its weight, of any other the inputs.
    channels = (call.output if call.kind.startswith("conv_transpose") else data).shape[1 - len(weight.shape)]
    return max(channels // max(weight.shape[1], 1), 1)


def _convolution(call: Call, data: Value, weight: Value) -> str:
    kernel, groups = weight.shape[2:], groups_of(call)
    inputs, outputs = weight.shape[1], weight.shape[0]
    if call.kind.startswith("conv_transpose"):
        inputs, outputs = weight.shape[0] // groups, groups * weight.shape[1]
    return small_convolution(inputs, outputs, groups, kernel, is_first=data.producer is None)
