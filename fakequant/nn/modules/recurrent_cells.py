"""Quantized recurrent cells: two products in plain sight, of quantized input and hidden state with quantized weights.

An exported cell is two Gemms that run as integers. Only the products read quantized values:
the cell state of an LSTM, and the hidden state that a GRU keeps a part of, are float, else
what a step changes by less than half a quantization step would be forgotten.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.errors import InvalidValueError
from fakequant.nn.modules.attention import has_only_idle_quantizers
from fakequant.nn.modules.quant_module import QuantMixin
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.registry import register


class QuantCell(QuantMixin, nn.RNNCellBase):
    """What the three cells share: torch's forward while all quantizers are idle, else the two products."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    input_names = ("input", "hidden")

    _has_cell_state: ClassVar[bool] = False

    _next: Callable[..., Any]
    """Returns the next state or states from what input and hidden state add to the gates, and from the states."""

    _hidden_quantizer: TensorQuantizer
    _weight_ih_quantizer: TensorQuantizer
    _weight_hh_quantizer: TensorQuantizer

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The two weights."""
        return ("weight_ih", "weight_hh")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state, or states, as torch does; a state that is not given is zeros, quantized like others.

        Raises:
            InvalidValueError: shapes that do not fit the cell or each other.
        """
        if has_only_idle_quantizers(self):
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros((*input.shape[:-1], self.hidden_size))
            hx = (zeros, zeros) if self._has_cell_state else zeros
        hidden, *rest = hx if self._has_cell_state else (hx,)
        self._check_shapes(input, hidden, *rest)
        of_input = F.linear(self._input_quantizer(input), self._weight_ih_quantizer(self.weight_ih), self.bias_ih)
        quantized = self._hidden_quantizer(hidden)
        of_hidden = F.linear(quantized, self._weight_hh_quantizer(self.weight_hh), self.bias_hh)
        return self._next(of_input, of_hidden, hidden, *rest)

    def _check_shapes(self, input: Tensor, *states: Tensor) -> None:
        """Refuse what would broadcast in silence; torch.jit.trace has no shapes to compare."""
        if torch.jit.is_tracing():
            return
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise InvalidValueError(
                f"input: expected shape (batch, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}"
            )
        expected = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if state.shape != expected:
                raise InvalidValueError(f"hx: expected states of shape {expected}, got {tuple(state.shape)}")


def next_lstm_states(of_input: Tensor, of_hidden: Tensor, _: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state of an LSTM.

    Args:
        of_input: what the input adds to the gates, [..., 4 * hidden], in torch's order: i f g o.
        of_hidden: the same of the hidden state.
        cell: state.
    """
    enter, keep, candidate, leave = (of_input + of_hidden).chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _next_gru_state(of_input: Tensor, of_hidden: Tensor, hidden: Tensor) -> Tensor:
    reset_x, keep_x, new_x = of_input.chunk(3, dim=-1)
    reset_h, keep_h, new_h = of_hidden.chunk(3, dim=-1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (hidden - new) * (keep_x + keep_h).sigmoid() + new


@register(nn.LSTMCell)
class QuantLSTMCell(QuantCell, nn.LSTMCell):
    """nn.LSTMCell with quantized input, hidden state and weights [4 * hidden, input or hidden]."""

    _has_cell_state = True
    _next = staticmethod(next_lstm_states)


@register(nn.GRUCell)
class QuantGRUCell(QuantCell, nn.GRUCell):
    """nn.GRUCell with quantized input, hidden state and weights [3 * hidden, input or hidden]."""

    _next = staticmethod(_next_gru_state)


@register(nn.RNNCell)
class QuantRNNCell(QuantCell, nn.RNNCell):
    """nn.RNNCell with quantized input, hidden state and weights [hidden, input or hidden]."""

    def _next(self, of_input: Tensor, of_hidden: Tensor, _: Tensor) -> Tensor:
        total = of_input + of_hidden
        return total.relu() if self.nonlinearity == "relu" else total.tanh()
