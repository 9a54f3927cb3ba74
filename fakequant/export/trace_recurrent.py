"""Recurrent layers while torch traces: each stacked layer is one ONNX op, and packed sequences stay padded.

torch's exporters would unroll nn.RNN over time, fail on packed sequences, and spend a dozen
nodes on states of zeros.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fakequant.errors import ExportError
from fakequant.export.lstm_codes import Rows, lstm_codes
from fakequant.export.recurrent_ops import in_onnx_order
from fakequant.nn.modules.lstm_in_steps import is_inside
from fakequant.nn.modules.recurrent import QuantLSTM

_LAYERS: tuple[type[nn.RNNBase], ...] = (rnn.LSTM, rnn.GRU, rnn.RNN)
"""torch's own, also where initialize() has put others into torch.nn."""

_FROM_OUTSIDE = (
    "PackedSequence: expected one that pack_padded_sequence makes in the exported forward, got one from outside. "
    "ONNX takes padded sequences and their lengths: let forward take them, and pack there"
)


@contextlib.contextmanager
def recurrent_layers(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Let the recurrent layers of a model be traced as ops of ONNX for a with block.

    Raises:
        ExportError: a layer with projections, which ONNX has not; names it. A PackedSequence among args. An LSTM
            in integers, in part or on another grid than its operator has.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    if not layers:
        yield
        return
    for name, layer in layers.items():
        if layer.proj_size:
            raise ExportError(
                f"{name or type(layer).__name__}: expected proj_size 0, for ONNX's LSTM has no projection, got "
                f"{layer.proj_size}. Use a smaller hidden_size, or an nn.LSTMCell and an nn.Linear in a loop"
            )
    if any(_is_packed(leaf) for leaf in pytree.tree_leaves(args, is_leaf=_is_packed)):
        raise ExportError(_FROM_OUTSIDE)
    packed = _PackedAsPadded()
    forward = _forward_in(packed, lstm_codes(model))
    patched = [*((cls, "forward") for cls in _LAYERS), (QuantLSTM, "in_steps")]
    originals = [(cls, name, getattr(cls, name)) for cls, name in patched]
    try:
        for cls, name in patched:
            setattr(cls, name, forward)
        with packed:
            yield
    finally:
        for cls, name, original in originals:
            setattr(cls, name, original)


def _is_packed(leaf: object) -> bool:
    return isinstance(leaf, PackedSequence)


class _PackedAsPadded(TorchFunctionMode):
    """What packs sequences leaves them padded, [T, N, features], and remembers their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Tensor, Tensor]] = []
        """(batch_sizes of a PackedSequence, lengths of its sequences)"""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the two functions behind pack_padded_sequence and pad_packed_sequence."""
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return self._pack(*args)
        if name == "_pad_packed_sequence":
            return self._pad(*args)
        return func(*args, **(kwargs or {}))

    def lengths(self, batch_sizes: Tensor) -> Tensor:
        """Return the lengths of the sequences that were packed.

        Raises:
            ExportError: they were packed elsewhere.
        """
        for known, lengths in self._known:
            if known is batch_sizes:
                return lengths
        raise ExportError(_FROM_OUTSIDE)

    def _pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        padded = input.transpose(0, 1) if batch_first else input
        batch_sizes = is_inside(padded, lengths).sum(dim=1)
        self._known.append((batch_sizes, lengths))
        return padded, batch_sizes

    def _pad(
        self, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
    ) -> tuple[Tensor, Tensor]:
        # Without total_length, torch cuts to the longest sequence; a size that data decides is none of a file, where
        # sequences keep the padded length that they came with.
        lengths = self.lengths(batch_sizes)
        inside = is_inside(data, lengths).reshape(*data.shape[:2], *[1] * (data.dim() - 2))
        padded = torch.where(inside, data, torch.full_like(data, padding_value))
        if total_length != data.shape[0]:
            more = data.new_full((total_length - data.shape[0], *data.shape[1:]), padding_value)
            padded = torch.cat([padded, more])
        return padded.transpose(0, 1) if batch_first else padded, lengths


def _forward_in(packed: _PackedAsPadded, integers: Mapping[nn.Module, list[tuple[Rows, Rows]]]) -> Callable[..., Any]:
    """Return the forward of torch's three layers, and of LSTMs in integers, while packed sequences are padded."""

    def forward(layer: nn.RNNBase, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        layer._update_flat_weights()
        codes = integers.get(layer)
        states = hx if isinstance(hx, tuple) else (hx,)
        output: Any
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            lengths = packed.lengths(batch_sizes).to(torch.int32)
            y, states = _stacked(layer, codes, x, lengths, _permuted(states, order))
            output, states = PackedSequence(y, batch_sizes, order, back), _permuted(states, back)
        elif input.dim() == 2:
            one = tuple(None if state is None else state.unsqueeze(1) for state in states)
            y, states = _stacked(layer, codes, input.unsqueeze(1), None, one)
            output, states = y.squeeze(1), tuple(state.squeeze(1) for state in states)
        else:
            y, states = _stacked(layer, codes, input.transpose(0, 1) if layer.batch_first else input, None, states)
            output = y.transpose(0, 1) if layer.batch_first else y
        return output, states if layer.mode == "LSTM" else states[0]

    return forward


def _permuted(states: tuple[Any, ...], order: Tensor | None) -> tuple[Any, ...]:
    """Return states with their sequences in another order."""
    return tuple(state if state is None or order is None else state.index_select(1, order) for state in states)


def _stacked(
    layer: nn.RNNBase,
    codes: list[tuple[Rows, Rows]] | None,
    x: Tensor,
    lengths: Tensor | None,
    states: tuple[Any, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the sequences and last states of [T, N, features], one op for each of the stacked layers."""
    directions = 2 if layer.bidirectional else 1
    named = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
    parameters = {name: parameter for name, parameter in named if parameter is not None}
    last: list[tuple[Tensor, ...]] = []
    for index in range(layer.num_layers):
        suffixes = [f"l{index}", f"l{index}_reverse"][:directions]
        if codes is None:
            kinds = ([parameters[f"weight_{of}_{suffix}"] for suffix in suffixes] for of in ("ih", "hh"))
            w, r = (torch.stack([in_onnx_order(layer.mode, weight) for weight in kind]) for kind in kinds)
        else:
            x = _on_grid(layer, index, x, lengths)
            w, r = (torch.ops.fakequant.gate_rows(*rows, directions) for rows in codes[index])
        b = None
        if layer.bias:
            pairs = [[parameters[f"bias_{of}_{suffix}"] for of in ("ih", "hh")] for suffix in suffixes]
            b = torch.stack([torch.cat([in_onnx_order(layer.mode, bias) for bias in pair]) for pair in pairs])
        own = [None if state is None else state[index * directions : (index + 1) * directions] for state in states]
        h, c = (*own, None, None)[:2]
        x, *ends = torch.ops.fakequant.recurrent(x, w, r, b, lengths, h, c, layer.mode, directions, layer.hidden_size)
        last.append(tuple(ends))
    count = 2 if layer.mode == "LSTM" else 1
    return x, tuple(torch.cat([ends[i] for ends in last]) if len(last) > 1 else last[0][i] for i in range(count))


def _on_grid(layer: nn.RNNBase, index: int, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the quantized input of one of the stacked layers of a QuantLSTM."""
    assert isinstance(layer, QuantLSTM)
    assert layer.hidden_quantizer is not None
    if not index and lengths is not None:  # what is behind the end of a sequence must not widen the range
        x = torch.where(is_inside(x, lengths).unsqueeze(-1), x, torch.zeros_like(x))
    quantized: Tensor = (layer.hidden_quantizer if index else layer._input_quantizer)(x)
    return quantized
