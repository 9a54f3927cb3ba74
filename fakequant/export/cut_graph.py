"""A Q/DQ graph cut at every activation quantizer, so that each stretch between two can be run on given codes.

Every activation's codes become an output of the graph, and what reads them reads a new
input instead. Fed with the codes of the torch model, one run tells for each quantizer
what the file computes from equal inputs: errors cannot add up along the network. With
the outputs alone, it tells what they add up to.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant.errors import ValidationError
from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY, constant_of, produced_by
from fakequant.export.rules.merge_quantizers import SEPARATOR

QUANTIZES = frozenset({"DynamicQuantizeLinear", "QuantizeLinear"})
"""Op types that make codes."""

_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})


@dataclasses.dataclass(frozen=True)
class Cut:
    """One activation quantizer of a cut graph.

    Args:
        quantizers: full names in the torch model of those that it stands for.
        call: the how-manieth call of the first of them, from 0.
        dtype: NumPy type of its codes.
        scale: the step between two codes; None if the graph computes it.
        zero_point: the code of 0; None if the graph computes it.
        computed: names of new graph outputs: the codes that the file computes, and behind them the scale and
            the zero point as far as it computes these.
    """

    quantizers: tuple[str, ...]
    call: int
    dtype: np.dtype[np.generic]
    scale: float | None
    zero_point: int | None
    computed: tuple[str, ...]

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the new graph inputs, which readers see in place of what is computed."""
        return tuple(f"{name}.given" for name in self.computed)

    def in_steps(self, arrays: Mapping[str, NDArray[Any]], names: Sequence[str]) -> NDArray[np.float64]:
        """Return how many steps from 0 the codes are; names are ``given`` or ``computed``."""
        codes = arrays[names[0]].astype(np.float64)
        steps: NDArray[np.float64] = codes - (arrays[names[-1]] if self.zero_point is None else self.zero_point)
        return steps

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
    for _, values, cut in _cuts(model.graph):
        model.graph.outputs.extend(value for value in values if value not in model.graph.outputs)
        cuts.append(cut)
    return tuple(cuts)


def cut_at_quantizers(model: ir.Model) -> tuple[Cut, ...]:
    """Expose the codes of every activation, give their readers new inputs, in place, and return the cuts in order."""
    cuts = expose_codes(model)
    for node, values, cut in list(_cuts(model.graph)):
        division = _division(node)
        for computed, name in zip(values, cut.given, strict=True):
            given = ir.Value(name=name, type=computed.type, shape=computed.shape)
            for reader, index in computed.uses():
                if reader is not division:
                    reader.replace_input_with(index, given)
            model.graph.inputs.append(given)
    return cuts


def quantizer_names(node: ir.Node) -> tuple[str, ...]:
    """Return the full names of the quantizers that a Q or DQ comes from; none for any other node."""
    return tuple(filter(None, node.metadata_props.get(QUANTIZER_KEY, "").split(SEPARATOR)))


def _cuts(graph: ir.Graph) -> Iterator[tuple[ir.Node, list[ir.Value], Cut]]:
    """Yield each Q with what is computed there: codes, and scale and zero point that are not constant."""
    for node in list(graph):
        quantizers, dtype = quantizer_names(node), node.outputs[0].dtype
        if node.op_type not in QUANTIZES or not quantizers or constant_of(node.inputs[0]) is not None:
            continue
        values, (scale, zero_point) = list(node.outputs), _parameters(node)
        if dtype not in _INTEGERS or (scale is None and node.op_type == "QuantizeLinear"):
            continue
        assert dtype is not None
        if (division := _division(node)) is not None and division.inputs[1] is not None:
            values.append(division.inputs[1])
            scale = None
        names = tuple(str(value.name) for value in values)
        yield node, values, Cut(quantizers, _call(node), dtype.numpy(), scale, zero_point, names)


def _parameters(node: ir.Node) -> tuple[float | None, int | None]:
    """Return scale and zero point of a Q; None for what the graph computes, or for a scale of channels."""
    if node.op_type == "DynamicQuantizeLinear":
        return None, None
    scale, zero_point = (constant_of(value) for value in (*node.inputs[1:], None)[:2])
    if scale is None or scale.size != 1:
        return None, None
    return float(scale.item()), 0 if zero_point is None else int(zero_point.item())


def _division(node: ir.Node) -> ir.Node | None:
    """Return the Div by a computed scale in front of a Q, which then has the scale 1."""
    division = produced_by(node.inputs[0], "Div")
    if division is None or division.metadata_props.get(MODULE_KEY) not in quantizer_names(node):
        return None
    return division


def _call(node: ir.Node) -> int:
    call = node.metadata_props.get(CALL_KEY, "0")
    if not call.isdecimal():
        raise ValidationError(f"{node.name}: expected the number of a call in its metadata {CALL_KEY!r}, got {call!r}")
    return int(call)
