"""A Q/DQ graph cut at every activation quantizer, so that each stretch between two can be run on given codes.

Every activation's codes become an output of the graph, and what reads them reads a new
input instead. Fed with the codes of the torch model, one run tells for each quantizer
what the file computes from equal inputs: errors cannot add up along the network. With
the outputs alone, it tells what they add up to.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from fakequant.errors import ValidationError
from fakequant.export.graph import CALL_KEY, QUANTIZER_KEY, constant_of
from fakequant.export.rules.merge_quantizers import SEPARATOR

_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})


@dataclasses.dataclass(frozen=True)
class Cut:
    """One activation quantizer of a cut graph.

    Args:
        quantizers: full names in the torch model of those that it stands for.
        call: the how-manieth call of the first of them, from 0.
        dtype: NumPy type of its codes.
        scale: the step between two codes.
        zero_point: the code of 0.
        given: name of the new graph input, the codes that readers see.
        computed: name of the new graph output, the codes that the file computes.
    """

    quantizers: tuple[str, ...]
    call: int
    dtype: np.dtype[np.generic]
    scale: float
    zero_point: int
    given: str
    computed: str

    @property
    def quantizer(self) -> str:
        """The first of its quantizers; the others compute the same."""
        return self.quantizers[0]

    @property
    def name(self) -> str:
        """The quantizer, with the call if it is not the first."""
        return f"{self.quantizer} (call {self.call + 1})" if self.call else self.quantizer


def expose_codes(model: ir.Model) -> tuple[Cut, ...]:
    """Make the codes of every activation outputs of a graph, in place, and return where to cut it, in order.

    Quantizers of constants, per-channel and float8 ones, and nodes without the name of a quantizer are left out.
    """
    cuts = []
    for node, cut in _cuts(model.graph):
        if node.outputs[0] not in model.graph.outputs:
            model.graph.outputs.append(node.outputs[0])
        cuts.append(cut)
    return tuple(cuts)


def cut_at_quantizers(model: ir.Model) -> tuple[Cut, ...]:
    """Expose the codes of every activation, give their readers new inputs, in place, and return the cuts in order."""
    cuts = expose_codes(model)
    for node, cut in _cuts(model.graph):
        codes = node.outputs[0]
        given = ir.Value(name=cut.given, type=codes.type, shape=codes.shape)
        for reader, index in codes.uses():
            reader.replace_input_with(index, given)
        model.graph.inputs.append(given)
    return cuts


def quantizer_names(node: ir.Node) -> tuple[str, ...]:
    """Return the full names of the quantizers that a Q or DQ comes from; none for any other node."""
    return tuple(filter(None, node.metadata_props.get(QUANTIZER_KEY, "").split(SEPARATOR)))


def _cuts(graph: ir.Graph) -> Iterator[tuple[ir.Node, Cut]]:
    for node in list(graph):
        quantizers = quantizer_names(node)
        if node.op_type != "QuantizeLinear" or not quantizers or constant_of(node.inputs[0]) is not None:
            continue
        scale, codes = constant_of(node.inputs[1]), node.outputs[0]
        if scale is None or scale.size != 1 or codes.dtype not in _INTEGERS:
            continue
        assert codes.dtype is not None
        zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        yield (
            node,
            Cut(
                quantizers=quantizers,
                call=_call(node),
                dtype=codes.dtype.numpy(),
                scale=float(scale.item()),
                zero_point=0 if zero_point is None else int(zero_point.item()),
                given=f"{codes.name}.given",
                computed=str(codes.name),
            ),
        )


def _call(node: ir.Node) -> int:
    call = node.metadata_props.get(CALL_KEY, "0")
    if not call.isdecimal():
        raise ValidationError(f"{node.name}: expected the number of a call in its metadata {CALL_KEY!r}, got {call!r}")
    return int(call)
