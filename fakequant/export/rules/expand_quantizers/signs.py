"""Signs of activations (the scheme "bnn"): Q rounds to a code 0 as well, so the sign is taken in front of it."""

import numpy as np
import onnx_ir as ir

from fakequant.export.rules.expand_quantizers.marker import Marker, Parameters


def quantize_signs(marker: Marker) -> ir.Value:
    """Return +1 where a marker's data are 0 or more, else -1, as int8 codes with the scale 1 and their DQ."""
    zero, plus, minus = (marker.constant(f"sign{code}", np.float32(code)) for code in (0, 1, -1))
    is_positive = marker.op("GreaterOrEqual", [marker.floats(), zero])
    is_positive.type = ir.TensorType(ir.DataType.BOOL)
    signs = marker.op("Where", [is_positive, plus, minus])
    zero_point = marker.constant("zero_point", np.zeros((), np.int8))
    parameters = Parameters(plus, zero_point, {})
    return marker.dequantize(marker.quantize(signs, parameters), parameters)
