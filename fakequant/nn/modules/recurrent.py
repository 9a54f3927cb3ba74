"""Quantized recurrent layers: what an ONNX LSTM, GRU or RNN can hold, and ONNX Runtime's DynamicQuantizeLSTM.

ONNX's operators compute in floats on every runtime. What a file can deploy of them, and the
layers simulate, is their input on a grid (of the first of several stacked layers) and every
weight on its own, per output channel (axis 0); the recurrence, the states, the biases and what
one stacked layer hands to the next stay float. DynamicQuantizeLSTM multiplies integers: it is
what an LSTM becomes whose input has the grid ``UINT8_OF_CALL``.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fakequant.descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from fakequant.errors import InvalidValueError
from fakequant.nn.modules.lstm_in_steps import lstm_in_steps
from fakequant.nn.modules.quant_module import QuantMixin, quantizer_name
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.registry import register

UINT8_OF_CALL = QuantDescriptor(8, unsigned=True, affine=True, dynamic=True)
"""The grid of ONNX's DynamicQuantizeLinear: each tensor has a range of its own."""

RUNS_IN_FLOAT = "ONNX's operator runs in float inside on every target; Q and DQ would only slow it down (R46)"
"""Why a recurrent layer stays float unless a rule asks for it."""


def is_uint8_of_call(grid: QuantDescriptor) -> bool:
    """Whether a grid is that of DynamicQuantizeLinear."""
    return grid.replace(name=None, calib_method=UINT8_OF_CALL.calib_method) == UINT8_OF_CALL


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
        quantized = self.quantized_weights()
        weights = [quantized[n] if n in quantized else getattr(self, n) for n in self._flat_weights_names]
        # A stand-in for this call alone: other threads may run this module at the same time.
        layer: Any = self.float_class.__new__(self.float_class)
        vars(layer).update(vars(self), _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        layer.flatten_parameters()  # on a GPU, cuDNN wants the new weights in one piece
        return layer.forward(x, hx)

    def quantized_weights(self) -> dict[str, Tensor]:
        """Return {name: quantized weight}."""
        return {name: quantizer(getattr(self, name)) for name, quantizer in self.weight_quantizers()}


@register(nn.LSTM)
class QuantLSTM(QuantRecurrent, nn.LSTM):
    """nn.LSTM with quantized input and weights [4 * hidden, input or hidden], [proj, hidden].

    With an input on ``UINT8_OF_CALL`` it quantizes hidden states too, each call anew; see ``lstm_in_steps``.
    """

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        """Add the quantizers; None takes the class default.

        Raises:
            InvalidValueError: the grid asks for quantized hidden states, and the layer has a projection.
        """
        super().init_quantizer(quant_desc_input, quant_desc_weight)
        quantizer = TensorQuantizer(self.input_quantizer.descriptor)
        self.set_hidden_quantizer(quantizer.to(self.input_quantizer._amax.device))

    def quantized_names(self) -> tuple[str, ...]:
        """Return the tensors that may have a quantizer: inputs, weights and hidden states."""
        return (*super().quantized_names(), "hidden")

    @property
    def hidden_quantizer(self) -> TensorQuantizer | None:
        """The quantizer of hidden states; None if they stay float."""
        return self._modules.get(quantizer_name("hidden"))  # type: ignore[return-value]

    @property
    def is_in_steps(self) -> bool:
        """Whether a call goes step by step, for hidden states to be quantized."""
        return self.hidden_quantizer is not None and self.hidden_quantizer.is_active

    def set_hidden_quantizer(self, quantizer: TensorQuantizer) -> None:
        """Take a quantizer on the grid of the input for hidden states, if that grid is the one that quantizes them.

        Raises:
            InvalidValueError: it is, and the layer has a projection.
        """
        self._modules.pop(quantizer_name("hidden"), None)
        if not is_uint8_of_call(quantizer.descriptor):
            return
        if self.proj_size:
            raise InvalidValueError(
                f"proj_size: expected 0 for an LSTM whose input has the grid {UINT8_OF_CALL}, got {self.proj_size}. "
                "ONNX Runtime's DynamicQuantizeLSTM has no projection"
            )
        self.add_module(quantizer_name("hidden"), quantizer)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Return what nn.LSTM returns for quantized input, weights and, on ``UINT8_OF_CALL``, hidden states."""
        return self.in_steps(input, hx) if self.is_in_steps else super().forward(input, hx)

    def in_steps(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        """Return what nn.LSTM returns, with quantized hidden states."""
        assert self.hidden_quantizer is not None
        quantizers = self._input_quantizer, self.hidden_quantizer
        return lstm_in_steps(self, self.quantized_weights(), quantizers, input, hx)


@register(nn.GRU)
class QuantGRU(QuantRecurrent, nn.GRU):
    """nn.GRU with quantized input and weights [3 * hidden, input or hidden]."""


@register(nn.RNN)
class QuantRNN(QuantRecurrent, nn.RNN):
    """nn.RNN with quantized input and weights [hidden, input or hidden]."""
