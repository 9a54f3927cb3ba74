"""Recurrent layers while torch traces: each stacked layer is one ONNX op, and packed sequences stay padded.

torch's exporters would unroll nn.RNN over time, fail on packed sequences, and spend a dozen
nodes on states of zeros.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fakequant.errors import ExportError

_LAYERS: tuple[type[nn.RNNBase], ...] = (rnn.LSTM, rnn.GRU, rnn.RNN)
"""torch's own, also where initialize() has put others into torch.nn."""

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""Which of torch's gates are those of ONNX, in ONNX's order: ifgo as iofg, rzn as zrn."""

_FROM_OUTSIDE = (
    "PackedSequence: expected one that pack_padded_sequence makes in the exported forward, got one from outside. "
    "ONNX takes padded sequences and their lengths: let forward take them, and pack there"
)


@contextlib.contextmanager
def recurrent_layers(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Let the recurrent layers of a model be traced as ops of ONNX for a with block.

    Raises:
        ExportError: a layer with projections, which ONNX has not; names it. A PackedSequence among args.
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
    originals = {cls: cls.forward for cls in _LAYERS}
    try:
        for cls in _LAYERS:
            cls.forward = _forward_in(packed)
        with packed:
            yield
    finally:
        for cls, original in originals.items():
            cls.forward = original


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
        batch_sizes = _is_inside(padded, lengths).sum(dim=1)
        self._known.append((batch_sizes, lengths))
        return padded, batch_sizes

    def _pad(
        self, data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
    ) -> tuple[Tensor, Tensor]:
        # Without total_length, torch cuts to the longest sequence; a size that data decides is none of a file, where
        # sequences keep the padded length that they came with.
        lengths = self.lengths(batch_sizes)
        inside = _is_inside(data, lengths).reshape(*data.shape[:2], *[1] * (data.dim() - 2))
        padded = torch.where(inside, data, torch.full_like(data, padding_value))
        if total_length != data.shape[0]:
            more = data.new_full((total_length - data.shape[0], *data.shape[1:]), padding_value)
            padded = torch.cat([padded, more])
        return padded.transpose(0, 1) if batch_first else padded, lengths


def _is_inside(padded: Tensor, lengths: Tensor) -> Tensor:
    """Return [T, N], whether a step is within its sequence."""
    steps = torch.arange(padded.shape[0], device=lengths.device)
    return lengths.unsqueeze(0) > steps.unsqueeze(1)


def _forward_in(packed: _PackedAsPadded) -> Callable[..., Any]:
    """Return the forward of torch's three layers while packed sequences are padded."""

    def forward(layer: nn.RNNBase, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        layer._update_flat_weights()
        states = hx if isinstance(hx, tuple) else (hx,)
        output: Any
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            lengths = packed.lengths(batch_sizes).to(torch.int32)
            y, states = _stacked(layer, x, lengths, _permuted(states, order))
            output, states = PackedSequence(y, batch_sizes, order, back), _permuted(states, back)
        elif input.dim() == 2:
            one = tuple(None if state is None else state.unsqueeze(1) for state in states)
            y, states = _stacked(layer, input.unsqueeze(1), None, one)
            output, states = y.squeeze(1), tuple(state.squeeze(1) for state in states)
        else:
            y, states = _stacked(layer, input.transpose(0, 1) if layer.batch_first else input, None, states)
            output = y.transpose(0, 1) if layer.batch_first else y
        return output, states if layer.mode == "LSTM" else states[0]

    return forward


def _permuted(states: tuple[Any, ...], order: Tensor | None) -> tuple[Any, ...]:
    """Return states with their sequences in another order."""
    return tuple(state if state is None or order is None else state.index_select(1, order) for state in states)


def _stacked(
    layer: nn.RNNBase, x: Tensor, lengths: Tensor | None, states: tuple[Any, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the sequences and last states of [T, N, features], one op for each of the stacked layers."""
    directions = 2 if layer.bidirectional else 1
    named = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
    in_order = {name: _in_order(layer.mode, weight) for name, weight in named}
    last: list[tuple[Tensor, ...]] = []
    for index in range(layer.num_layers):
        suffixes = [f"l{index}", f"l{index}_reverse"][:directions]
        w, r = (torch.stack([in_order[f"weight_{of}_{suffix}"] for suffix in suffixes]) for of in ("ih", "hh"))
        b = None
        if layer.bias:
            pairs = [[in_order[f"bias_{of}_{suffix}"] for of in ("ih", "hh")] for suffix in suffixes]
            b = torch.stack([torch.cat(pair) for pair in pairs])
        own = [None if state is None else state[index * directions : (index + 1) * directions] for state in states]
        h, c = (*own, None, None)[:2]
        x, *ends = torch.ops.fakequant.recurrent(x, w, r, b, lengths, h, c, layer.mode, directions, layer.hidden_size)
        last.append(tuple(ends))
    count = 2 if layer.mode == "LSTM" else 1
    return x, tuple(torch.cat([ends[i] for ends in last]) if len(last) > 1 else last[0][i] for i in range(count))


def _in_order(mode: str, weight: Tensor | None) -> Tensor:
    """Return a weight or bias with the gates in ONNX's order."""
    assert weight is not None
    order = _GATES.get(mode)
    if order is None:
        return weight
    size = len(weight) // len(order)
    return torch.cat([weight[gate * size : (gate + 1) * size] for gate in order])
