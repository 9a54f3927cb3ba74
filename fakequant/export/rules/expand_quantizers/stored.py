"""Constants: codes, computed once with the formulas of fakequant.arithmetic, and a DQ.

The bounds are the quantizer's, which may be narrower than the ONNX type's (4 bits in int8;
-127 as the lowest int8 weight). Codes of 4 bits in blocks are INT4, two in a byte.
"""

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from fakequant import arithmetic
from fakequant.export.rules.expand_quantizers.marker import Marker, Parameters
from fakequant.export.rules.expand_quantizers.types import FLOAT_TYPES, stored_type


class Stored:
    """The constants of one graph; codes of a weight that two layers tie are stored once."""

    def __init__(self) -> None:
        self._values: dict[tuple[object, ...], tuple[ir.Value, Parameters]] = {}

    def dequantized(self, marker: Marker, constant: NDArray[np.generic]) -> ir.Value:
        """Store a marker's constant and return what its DQ makes of it."""
        data = torch.from_numpy(np.require(constant, requirements="W"))  # that of a Constant is read-only
        if isinstance(marker.grid.num_bits, tuple):
            codes, scale, zero_point = _float_codes(marker, data, marker.grid.num_bits)
            dtype = FLOAT_TYPES[marker.grid.num_bits]
        else:
            codes, scale, zero_point = marker.quantizer.codes_of(data)
            dtype = stored_type(marker.grid, *marker.quantizer.bounds)
        scales, zeros = (None if t is None else t.detach().cpu().numpy().tobytes() for t in (scale, zero_point))
        key = marker.data, scales, zeros, dtype
        if key not in self._values:
            array = codes.detach().cpu().numpy().astype(dtype.numpy())
            self._values[key] = marker.codes(array, dtype), marker.parameters(scale, zero_point, dtype)
        return marker.dequantize(*self._values[key])


def _float_codes(marker: Marker, data: Tensor, num_bits: tuple[int, int]) -> arithmetic.Codes:
    """Return the numbers of a float format in units of the scale."""
    scale = marker.quantizer.scale
    assert scale is not None
    steps = torch.from_numpy(np.asarray(marker.broadcast(scale)))
    return arithmetic.Codes(arithmetic.quantize_float(data.div(steps), torch.ones(()), num_bits), scale, None)
