"""Make constants of what computes the weights of LSTM, GRU and RNN: torch's gates in ONNX's order.

Without a DequantizeLinear in front of them there is nothing left to do in a run. Those of an LSTM whose input
each call quantizes anew stay integers; see ``integer_lstms``.
"""

from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnxscript import optimizer

from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY, produced_by
from fakequant.export.kernels import RECURRENT
from fakequant.export.rules.integer_lstms import stored_rows
from fakequant.export.rules.merge_quantizers import SEPARATOR

_WEIGHTS = (1, 2, 3)
"""The inputs W, R and B."""

_LENGTHS = 4
"""The input sequence_lens."""


class RecurrentWeights(ir.passes.InPlacePass):
    """Folds what is in front of the weights of every recurrent op, and names the quantizers that they are from.

    Args:
        stored: names of the quantizers of weights that are constants already, and of what an op quantizes itself.
    """

    def __init__(self, stored: Collection[str]) -> None:
        super().__init__()
        self._stored = stored

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold and name."""
        found = [node for node in model.graph.all_nodes() if node.domain == "" and node.op_type in RECURRENT]
        to_fold = ((node, index) for node in found for index in _WEIGHTS if stored_rows(node, index) is None)
        above = {before for node, index in to_fold for before in _above(node, index)}
        if above:
            optimizer.fold_constants(model, should_fold=lambda node: node in above)
        for node in found:
            module = node.metadata_props.get(MODULE_KEY, "")
            names = [name for name in self._stored if name.rpartition(".")[0] == module]
            if names:
                node.metadata_props[QUANTIZER_KEY] = SEPARATOR.join(sorted(names))
            if len(node.inputs) > _LENGTHS and node.inputs[_LENGTHS] is not None:
                _unname(node)
        return ir.passes.PassResult(model, bool(found))


def _above(node: ir.Node, index: int) -> Iterator[ir.Node]:
    """Yield everything that computes an input of a node."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = None if value is None else value.producer()
    if producer is not None:
        yield producer
        for before in range(len(producer.inputs)):
            yield from _above(producer, before)


def _unname(recurrent: ir.Node) -> None:
    """Take the quantizer's name off Q and DQ of padded sequences: torch quantizes packed ones, of another shape."""
    dequantize = produced_by(recurrent.inputs[0], "DequantizeLinear")
    quantize = None if dequantize is None else produced_by(dequantize.inputs[0], "QuantizeLinear")
    for node in (dequantize, quantize):
        if node is not None:
            for key in (QUANTIZER_KEY, CALL_KEY):
                node.metadata_props.pop(key, None)
