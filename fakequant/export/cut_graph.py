"""A Q/DQ graph cut at every activation quantizer, so that each stretch between two can be run on given codes.

Every activation's codes become an output of the graph, and what reads them reads a new
input instead. Fed with the codes of the torch model, one run tells for each quantizer
what the file computes from equal inputs: errors cannot add up along the network.
"""

import dataclasses

import numpy as np
import onnx_ir as ir

from fakequant.export.graph import CALL_KEY, QUANTIZER_KEY, constant_of
from fakequant.export.rules.merge_quantizers import SEPARATOR

_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})


@dataclasses.dataclass(frozen=True)
class Cut:
    """One activation quantizer of a cut graph.

    Args:
        quantizer: its full name in the torch model.
        call: the how-manieth call of that quantizer, from 0.
        dtype: NumPy type of its codes.
        zero_point: the code of 0.
        given: name of the new graph input, the codes that readers see.
        computed: name of the new graph output, the codes that the file computes.
    """

    quantizer: str
    call: int
    dtype: np.dtype[np.generic]
    zero_point: int
    given: str
    computed: str


def cut_at_quantizers(model: ir.Model) -> tuple[Cut, ...]:
    """Cut a graph in place and return its cuts, in order of execution.

    Quantizers of constants, per-channel and float8 ones, and nodes without the name of a quantizer are not cut.
    """
    graph, cuts = model.graph, []
    for node in list(graph):
        quantizer = node.metadata_props.get(QUANTIZER_KEY, "").split(SEPARATOR)[0]
        if node.op_type != "QuantizeLinear" or not quantizer or constant_of(node.inputs[0]) is not None:
            continue
        scale, codes = constant_of(node.inputs[1]), node.outputs[0]
        if scale is None or scale.size != 1 or codes.dtype not in _INTEGERS:
            continue
        given = ir.Value(name=f"{codes.name}.given", type=codes.type, shape=codes.shape)
        for reader, index in codes.uses():
            reader.replace_input_with(index, given)
        graph.inputs.append(given)
        if codes not in graph.outputs:
            graph.outputs.append(codes)
        assert codes.dtype is not None
        call = int(node.metadata_props.get(CALL_KEY, "0"))
        zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        zero = 0 if zero_point is None else int(zero_point.item())
        cuts.append(Cut(quantizer, call, codes.dtype.numpy(), zero, str(given.name), str(codes.name)))
    return tuple(cuts)
