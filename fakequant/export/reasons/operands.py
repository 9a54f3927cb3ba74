"""What is in front of an op, and the op itself."""

import onnx_ir as ir

from fakequant.export.graph import constant_of
from fakequant.export.grid import Grid
from fakequant.export.kernels import RECURRENT
from fakequant.export.quantized_edges import behind_clip, dequantizer_of, grid_behind, grid_in_front, reads_of
from fakequant.export.reasons.bias import result_of
from fakequant.export.reasons.registry import reason

_SEVERAL = ("Add", "Concat", "Mul")
_ONE = ("AveragePool", "GlobalAveragePool", "Sigmoid", "Softmax")
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@reason("ConvTranspose")
def _conv_transpose(node: ir.Node) -> str | None:
    return "ConvTranspose has no integer kernel"


@reason(*RECURRENT)
def _recurrent(node: ir.Node) -> str | None:
    return f"{node.op_type} has no integer kernel; Q and DQ in front of it only round its input"


@reason("ReduceMean")
def _reduce_mean(node: ir.Node) -> str | None:
    return "ReduceMean has no integer kernel; GlobalAveragePool has"


@reason(*_WEIGHTED, *_SEVERAL)
def _float_operand(node: ir.Node) -> str | None:
    operands = _operands(node)
    bare = [index for index, value in enumerate(operands) if dequantizer_of(value) is None]
    constant = [index for index in bare if constant_of(operands[index]) is not None]
    if node.op_type in {"Conv", "Gemm"} and bare == constant == [1]:
        return None  # ONNX Runtime quantizes such a weight itself (weight_bias_quantization.cc)
    words = [f"input {index} is a float{' constant' if index in constant else ''}" for index in bare]
    return " and ".join(words) or None


@reason(*_WEIGHTED, *_SEVERAL, *_ONE, "MaxPool")
def _not_8_bits(node: ir.Node) -> str | None:
    grids = [*(grid_in_front(value) for value in _operands(node)), grid_behind(node.outputs[0])]
    other = {grid.written.name.lower() for grid in grids if grid is not None and not grid.is_8_bit_integer}
    return f"there are integer kernels for int8 and uint8, not for {' and '.join(sorted(other))}" if other else None


@reason("Conv", "MatMul")
def _int8_data(node: ir.Node) -> str | None:
    grid = grid_in_front(node.inputs[0])
    if grid is None or grid.dtype != ir.DataType.INT8:
        return None
    return f"its input is int8 and is read by {grid.reads} ops" if grid.reads > 1 else "its input is int8, made by no Q"


@reason(*_WEIGHTED, *_SEVERAL, *_ONE)
def _types_differ(node: ir.Node) -> str | None:
    if node.op_type in {"Conv", "MatMul"} and _int8_data(node):
        return None  # said already
    data = node.inputs[:1] if node.op_type in _WEIGHTED else node.inputs
    return _difference([grid_in_front(value) for value in data], grid_behind(behind_clip(result_of(node))))


@reason("MaxPool")
def _grids_differ(node: ir.Node) -> str | None:
    front, behind = grid_in_front(node.inputs[0]), grid_behind(node.outputs[0])
    if front is None:
        return None
    if behind is None:  # Q and DQ are copied behind it
        behind = front.read_by(reads_of(node.outputs[0]))
    if front.dtype != behind.dtype:
        return _difference([front], behind)
    return None if front.like(behind) else "the scales or zero points in front of it and behind it differ"


@reason("MaxPool")
def _max_pool_of_floats(node: ir.Node) -> str | None:
    opset = node.graph.opset_imports.get("", 0) if isinstance(node.graph, ir.Graph) else 0
    return f"MaxPool of opset {opset} takes floats only; that of opset 12 takes integers" if 0 < opset < 12 else None


def _operands(node: ir.Node) -> list[ir.Value | None]:
    """Return the inputs without a bias."""
    return list(node.inputs if node.op_type in _SEVERAL else node.inputs[:2])


def _difference(front: list[Grid | None], behind: Grid | None) -> str | None:
    grids = [grid for grid in front if grid is not None]
    if len({grid.dtype for grid in [*grids, behind] if grid is not None}) < 2:
        return None
    output = "" if behind is None else f"; output {behind.in_words}"
    return f"types differ: input {', '.join(grid.in_words for grid in grids)}{output}"
