"""Quantized recurrent layers: what an ONNX LSTM, GRU or RNN can hold.

No runtime computes these operators in integers. What a file can deploy, and the layers
simulate, is their input on a grid (of the first of several stacked layers) and every weight
on its own, per output channel (axis 0); the recurrence, the states, the biases and what one
stacked layer hands to the next stay float.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from fakequant.nn.modules.quant_module import QuantMixin, quantizer_name
from fakequant.nn.registry import register

RUNS_IN_FLOAT = "runs in float inside on every target; Q and DQ would only slow it down (R46)"
"""Why a recurrent layer stays float unless a rule asks for it."""


class QuantRecurrent(QuantMixin, nn.RNNBase):
    """What the three layers share: torch's own forward, of a float layer that has the quantized weights."""

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Every weight of every stacked layer and direction: ``weight_ih_l0``, ``weight_hh_l0_reverse``, ..."""
        return tuple(name for name in self._flat_weights_names if name.startswith("weight"))

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return what the float class returns for the quantized input and weights; arguments are torch's.

        A PackedSequence is quantized without padding.
        """
        quantize = self._input_quantizer
        x = input._replace(data=quantize(input.data)) if isinstance(input, PackedSequence) else quantize(input)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        for name in self.weight_names:
            index = self._flat_weights_names.index(name)
            weights[index] = self._modules[quantizer_name(name)](weights[index])  # type: ignore[misc]
        # A stand-in for this call alone: other threads may run this module at the same time.
        layer: Any = self.float_class.__new__(self.float_class)
        vars(layer).update(vars(self), _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        layer.flatten_parameters()  # on a GPU, cuDNN wants the new weights in one piece
        return layer.forward(x, hx)


@register(nn.LSTM)
class QuantLSTM(QuantRecurrent, nn.LSTM):
    """nn.LSTM with quantized input and weights [4 * hidden, input or hidden], [proj, hidden]."""


@register(nn.GRU)
class QuantGRU(QuantRecurrent, nn.GRU):
    """nn.GRU with quantized input and weights [3 * hidden, input or hidden]."""


@register(nn.RNN)
class QuantRNN(QuantRecurrent, nn.RNN):
    """nn.RNN with quantized input and weights [hidden, input or hidden]."""
