"""An LSTM step by step, with its hidden state quantized in each, as ONNX Runtime's DynamicQuantizeLSTM computes it.

Each stacked layer is one such operator. It takes one range from its input, all steps and
sequences together, and one from the hidden state of each step, all sequences together; one
that is over counts as zeros. The reverse direction begins at the end of each sequence.
Products are of quantized values; the cell state, and what leaves a step, are float.

The operator splits a batch over the threads of its session, if it is larger than 4, or than
1 with up to 256 hidden elements: each share of the sequences then has ranges of its own, and
only a session with one thread computes what is computed here.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fakequant.nn.modules.recurrent_cells import next_lstm_states

_Quantize: TypeAlias = Callable[[Tensor], Tensor]
_States: TypeAlias = tuple[Tensor, Tensor]


def lstm_in_steps(
    layer: nn.LSTM,
    weights: Mapping[str, Tensor],
    quantizers: tuple[_Quantize, _Quantize],
    input: Tensor | PackedSequence,
    hx: _States | None,
) -> Any:
    """Return what nn.LSTM returns.

    Args:
        layer: without projection.
        weights: quantized, by name.
        quantizers: of the input, and of hidden states, also of those that one stacked layer hands to the next.
        input: as for nn.LSTM.
        hx: likewise.
    """
    quantize_input, quantize_hidden = quantizers
    if isinstance(input, PackedSequence):
        quantized = PackedSequence(quantize_input(input.data), input.batch_sizes)
        given = None if hx is None else layer.permute_hidden(hx, input.sorted_indices)
        x, lengths = pad_packed_sequence(quantized)
        y, last = _stacked(layer, weights, quantize_hidden, x, given, lengths)
        packed = input._replace(data=pack_padded_sequence(y, lengths).data)
        return packed, layer.permute_hidden(last, input.unsorted_indices)
    if input.dim() == 2:
        one = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        y, last = _stacked(layer, weights, quantize_hidden, quantize_input(input).unsqueeze(1), one)
        return y.squeeze(1), (last[0].squeeze(1), last[1].squeeze(1))
    x = quantize_input(input)
    y, last = _stacked(layer, weights, quantize_hidden, x.transpose(0, 1) if layer.batch_first else x, hx)
    return y.transpose(0, 1) if layer.batch_first else y, last


def is_inside(padded: Tensor, lengths: Tensor) -> Tensor:
    """Return [T, N], whether a step of padded sequences [T, N, ...] is within its sequence."""
    steps = torch.arange(padded.shape[0], device=lengths.device)
    return lengths.unsqueeze(0) > steps.unsqueeze(1)


def _stacked(
    layer: nn.LSTM,
    weights: Mapping[str, Tensor],
    quantize: _Quantize,
    x: Tensor,
    hx: _States | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, _States]:
    """Return the sequences and last states of quantized sequences [T, N, features]."""
    suffixes = ("", "_reverse")[: 2 if layer.bidirectional else 1]
    if hx is None:
        zeros = x.new_zeros(layer.num_layers * len(suffixes), x.shape[1], layer.hidden_size)
        hx = zeros, zeros
    _check(layer, x, hx)
    last: list[_States] = []
    for index in range(layer.num_layers):
        x = quantize(F.dropout(x, layer.dropout, layer.training)) if index else x
        outputs = []
        for suffix in suffixes:
            names = (f"{kind}_l{index}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            w_ih, w_hh, b_ih, b_hh = (weights[n] if n in weights else getattr(layer, n, None) for n in names)
            forward = _from_ends(x, lengths) if suffix else x
            states = hx[0][len(last)], hx[1][len(last)]
            y, states = _direction(F.linear(forward, w_ih, b_ih), w_hh, b_hh, quantize, states, lengths)  # type: ignore[arg-type]
            outputs.append(_from_ends(y, lengths) if suffix else y)
            last.append(states)
        x = torch.cat(outputs, dim=-1)
    return x, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))


def _direction(
    of_input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantize: _Quantize,
    states: _States,
    lengths: Tensor | None,
) -> tuple[Tensor, _States]:
    """Return the sequences and last states of one direction, from what the input adds to the gates."""
    h, c = (state.to(of_input.dtype) for state in states)  # autocast gives products another one, and torch's LSTM too
    last_h, outputs = h, []
    inside = None if lengths is None else is_inside(of_input, lengths.to(of_input.device)).unsqueeze(-1)
    for t, gates in enumerate(of_input.unbind(0)):
        next_h, next_c = next_lstm_states(gates, F.linear(quantize(h), weight, bias), h, c)
        if inside is None:
            h, c, last_h = next_h, next_c, next_h
        else:
            last_h, c = torch.where(inside[t], next_h, last_h), torch.where(inside[t], next_c, c)
            h = torch.where(inside[t], next_h, 0.0)
        outputs.append(h)
    return torch.stack(outputs), (last_h, c)


def _from_ends(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return sequences [T, N, features] from their ends on; what is behind an end stays there."""
    if lengths is None:
        return x.flip(0)
    lengths = lengths.to(x.device)
    steps = torch.arange(len(x), device=x.device).unsqueeze(1)
    source = torch.where(is_inside(x, lengths), lengths - 1 - steps, steps)
    return x.gather(0, source.unsqueeze(-1).expand_as(x))


def _check(layer: nn.LSTM, x: Tensor, states: _States) -> None:
    """Raise torch's errors for shapes; torch.jit.trace has no shapes to compare."""
    if torch.jit.is_tracing():
        return
    layer.check_input(x, None)
    expected = layer.num_layers * (2 if layer.bidirectional else 1), x.shape[1], layer.hidden_size
    for index, state in enumerate(states):
        layer.check_hidden_size(state, expected, f"Expected hidden[{index}] size {{}}, got {{}}")
