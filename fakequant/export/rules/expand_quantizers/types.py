"""The ONNX types that hold the codes of a grid."""

import onnx_ir as ir

from fakequant.descriptor import QuantDescriptor
from fakequant.onnx_ops import container

FLOAT_TYPES = {(4, 3): ir.DataType.FLOAT8E4M3FN, (5, 2): ir.DataType.FLOAT8E5M2}
"""Of the float formats that ONNX has at opset 21."""

_FOUR_BITS = ((ir.DataType.INT4, -8, 7), (ir.DataType.UINT4, 0, 15))


def integer_type(low: int, high: int) -> tuple[ir.DataType, bool]:
    """Return the ONNX type that holds codes low..high, and whether its own clamp is not enough."""
    dtype, needs_clip = container(low, high)
    return ir.DataType[str(dtype).removeprefix("torch.").upper()], needs_clip


def stored_type(grid: QuantDescriptor, low: int, high: int) -> ir.DataType:
    """Return the ONNX type of stored codes: 4 bits in blocks are two in a byte."""
    if grid.block_size is not None:
        for dtype, lowest, highest in _FOUR_BITS:
            if lowest <= low and high <= highest:
                return dtype
    return integer_type(low, high)[0]
