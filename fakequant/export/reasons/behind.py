"""What is behind an op."""

import onnx_ir as ir

from fakequant.export.grid import absorbs
from fakequant.export.quantized_edges import (
    CLIPS,
    behind_clip,
    grid_behind,
    only_reader,
    quantizer_behind,
    reads_of,
)
from fakequant.export.reasons.bias import result_of
from fakequant.export.reasons.registry import reason

_NEED_Q = ("Add", "AveragePool", "Concat", "Conv", "GlobalAveragePool", "Mul", "Sigmoid", "Softmax")
_NEED_NONE = ("Gemm", "MatMul")


@reason(*_NEED_Q)
def _no_quantizer(node: ir.Node) -> str | None:
    value = node.outputs[0]
    reader = only_reader(value)
    if reads_of(value) > 1:
        return f"its output is read {_times(value)}, not by one QuantizeLinear alone"
    if quantizer_behind(behind_clip(value)) is not None:
        return None
    if reader is None:
        return "no QuantizeLinear on its output, which is an output of the graph"
    if reader.op_type in CLIPS and reads_of(reader.outputs[0]) > 1:
        return f"the {reader.op_type} behind it is read {_times(reader.outputs[0])}, not by one QuantizeLinear alone"
    return f"no QuantizeLinear on its output; {reader.op_type} is behind it"


@reason(*_NEED_NONE, "MaxPool")
def _quantizer_and_others(node: ir.Node) -> str | None:
    value = result_of(node)
    if reads_of(value) < 2 or all(reader.op_type != "QuantizeLinear" for reader in value.consumers()):
        return None
    return f"its output is read {_times(value)}, not by one QuantizeLinear alone"


@reason(*_NEED_Q, *_NEED_NONE)
def _clip_not_absorbed(node: ir.Node) -> str | None:
    clip = only_reader(result_of(node))
    if clip is None or clip.op_type not in CLIPS:
        return None
    quantizer, grid = quantizer_behind(clip.outputs[0]), grid_behind(clip.outputs[0])
    if quantizer is None or grid is None or absorbs(quantizer, clip):
        return None
    words = f"{grid.written.name.lower()} with zero point {grid.zero_point}"
    if clip.op_type == "Relu":
        return f"Relu behind it is not absorbed: the output's grid is {words}; uint8 with zero point 0 is"
    return f"Clip behind it is not absorbed: the output's grid is {words} and scale {grid.scale}, not within its bounds"


@reason(*_NEED_NONE)
def _clip_without_quantizer(node: ir.Node) -> str | None:
    # qdq_selectors.cc gives up at a Relu that one op other than Q reads, though it needs no Q without the Relu.
    clip = only_reader(result_of(node))
    if clip is None or clip.op_type not in CLIPS or quantizer_behind(clip.outputs[0]) is not None:
        return None
    reader = only_reader(clip.outputs[0])
    return None if reader is None else f"{clip.op_type} and then {reader.op_type}, no QuantizeLinear, behind it"


def _times(value: ir.Value) -> str:
    count = len(value.uses())
    is_output = " and is an output of the graph" if value.is_graph_output() else ""
    return ("once" if count == 1 else f"{count} times") + is_output
