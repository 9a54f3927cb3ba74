"""How a Q or DQ quantizes, and as which type ONNX Runtime CPU runs that."""

import dataclasses
import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.export.graph import constant_of


@dataclasses.dataclass(frozen=True)
class Grid:
    """The type of a quantized tensor, and how it is quantized.

    Args:
        dtype: as ONNX Runtime runs it.
        reads: how many ops read it. 1 for a weight: each op gets its own.
        scale: None if it is computed in the graph.
        zero_point: 0 if there is none; None if it is computed in the graph.
        written: dtype as in the file.
    """

    dtype: ir.DataType
    reads: int
    scale: NDArray[np.generic] | None
    zero_point: NDArray[np.generic] | None
    written: ir.DataType

    @property
    def is_8_bit_integer(self) -> bool:
        """Whether its type is int8 or uint8."""
        return self.written in {ir.DataType.INT8, ir.DataType.UINT8}

    @property
    def in_words(self) -> str:
        """The type in the file, and the one it runs as if that needs saying."""
        name = self.written.name.lower()
        if self.dtype != self.written:
            return f"{name} (runs as {self.dtype.name.lower()})"
        is_fork = self.dtype == ir.DataType.INT8 and self.reads > 1
        return f"{name} (stays so: {self.reads} ops read it)" if is_fork else name

    def read_by(self, reads: int) -> "Grid":
        """Return the grid of a copy that so many ops read."""
        dtype = ir.DataType.UINT8 if self.is_8_bit_integer and reads == 1 else self.written
        return dataclasses.replace(self, dtype=dtype, reads=reads)

    def like(self, other: "Grid") -> bool:
        """Whether both run with one type, scale and zero point."""
        if self.dtype != other.dtype or self.scale is None or other.scale is None:
            return False
        zero_points = self._zero_point_run(), other._zero_point_run()
        return np.array_equal(self.scale, other.scale) and np.array_equal(*zero_points)

    def _zero_point_run(self) -> NDArray[np.float64]:
        """Return the zero point as it runs, nan, which equals nothing, if it is computed in the graph."""
        shift = 128 if self.dtype != self.written else 0
        return np.asarray(np.nan if self.zero_point is None else self.zero_point, np.float64) + shift


def grid_of(node: ir.Node, reads: int, *, converts: bool = True) -> Grid:
    """Return the grid of a Q or DQ.

    Args:
        node: the Q or DQ.
        reads: how many ops read what it quantizes.
        converts: whether int8 may run as uint8, as activations do and weights do not.
    """
    scale = constant_of(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = np.zeros_like(scale, np.uint8) if given is None and scale is not None else constant_of(given)
    written = _dtype(node, given, zero_point)
    # qdq_s8_to_u8.cc: a pair of Q and DQ that nothing else reads, with one zero point each.
    rewritten = written == ir.DataType.INT8 and converts and reads == 1 and given is not None
    return Grid(ir.DataType.UINT8 if rewritten else written, reads, scale, zero_point, written)


def _dtype(node: ir.Node, given: ir.Value | None, zero_point: NDArray[np.generic] | None) -> ir.DataType:
    if given is not None and given.dtype is not None:
        return given.dtype
    if given is not None and zero_point is not None:
        return ir.DataType.from_numpy(zero_point.dtype)
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    default = ir.DataType(node.attributes.get_int("output_dtype", 0)) if node.op_type == "QuantizeLinear" else None
    known = default or (None if codes is None else codes.dtype)
    return known or ir.DataType.UINT8  # what ONNX says without a zero point


def absorbs(quantizer: ir.Node, activation: ir.Node) -> bool:
    """Whether the grid of a Q cuts off all that a Relu or Clip in front of it does (qdq_util.cc)."""
    grid = grid_of(quantizer, 1)
    if grid.scale is None or grid.zero_point is None or grid.zero_point.size != 1 or not grid.is_8_bit_integer:
        return False
    codes = np.iinfo(grid.written.numpy())
    zero_point = int(grid.zero_point.item())
    if activation.op_type == "Relu":
        return zero_point == codes.min
    if grid.scale.ndim:
        return False
    low, high = (_bound(activation, index, grid.scale.item()) for index in (1, 2))
    return low + zero_point <= codes.min and high + zero_point >= codes.max


def _bound(clip: ir.Node, index: int, scale: float) -> float:
    """Return a bound of a Clip in steps of the scale; nan, which fits nothing, if it is computed in the graph."""
    if len(clip.inputs) <= index or clip.inputs[index] is None:
        return (-math.inf, math.inf)[index - 1]
    bound = constant_of(clip.inputs[index])
    return math.nan if bound is None else float(np.rint(bound.item() / scale))
