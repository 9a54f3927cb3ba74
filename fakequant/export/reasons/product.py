"""What is special about Gemm and MatMul, and the bias of a Conv."""

import onnx_ir as ir

from fakequant.export.graph import constant_of
from fakequant.export.quantized_edges import behind_clip, dequantizer_of, grid_in_front, quantizer_behind
from fakequant.export.reasons.bias import bias_of, columns_of, result_of, shape_of
from fakequant.export.reasons.registry import reason


@reason("Gemm", "MatMul")
def _float_bias(node: ir.Node) -> str | None:
    bias = bias_of(node)
    if bias is None or _is_int32(bias) or quantizer_behind(behind_clip(result_of(node))) is not None:
        return None
    return f"{_gemm(node)}float bias and no QuantizeLinear on its output"


@reason("Gemm", "MatMul")
def _shape_of_bias(node: ir.Node) -> str | None:
    bias = bias_of(node)
    shape, columns = shape_of(bias), columns_of(node)
    if bias is None or _is_int32(bias) or shape is None or columns is None or shape == [columns]:
        return None
    return f"{_gemm(node)}its bias is of shape {shape}, not [{columns}]"


@reason("Conv", "Gemm", "MatMul")
def _computed_bias(node: ir.Node) -> str | None:
    bias = bias_of(node)
    if bias is None or constant_of(bias) is not None or dequantizer_of(bias) is not None:
        return None
    return f"{_gemm(node)}its bias is computed in the graph"


@reason("Gemm")
def _alpha_and_beta(node: ir.Node) -> str | None:
    factors = {name: node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")}
    odd = [f"{name} is {factor:g}, not 1" for name, factor in factors.items() if factor != 1]
    return f"it has a bias and {' and '.join(odd)}" if odd and bias_of(node) is not None else None


def _is_int32(bias: ir.Value) -> bool:
    grid = grid_in_front(bias)
    return grid is not None and grid.written == ir.DataType.INT32


def _gemm(node: ir.Node) -> str:
    return "it becomes a Gemm with the Add behind it: " if node.op_type == "MatMul" else ""
