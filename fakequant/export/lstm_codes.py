"""The weights of an LSTM that multiplies integers: int8 codes and their scales, in the layout of ONNX."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fakequant.errors import ExportError
from fakequant.export.recurrent_ops import in_onnx_order
from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.recurrent import QuantLSTM
from fakequant.nn.walk import named_quantizers
from fakequant.onnx_ops import container


class Rows(NamedTuple):
    """A weight of one stacked layer, the rows of the reverse direction below those of the other.

    Attributes:
        codes: int8, [directions * 4 * hidden, inputs].
        scale: one a row.
    """

    codes: Tensor
    scale: Tensor


def lstm_codes(model: nn.Module) -> dict[nn.Module, list[tuple[Rows, Rows]]]:
    """Return the weights of the input and of the hidden state, for each stacked layer of every such LSTM.

    Raises:
        ExportError: a quantizer of such a layer is disabled, or the grid of a weight is none that
            DynamicQuantizeLSTM reads; names them.
    """
    lstms = {name: m for name, m in model.named_modules() if isinstance(m, QuantLSTM) and m.is_in_steps}
    return {lstm: _stacked(name or type(lstm).__name__, lstm) for name, lstm in lstms.items()}


def _stacked(name: str, lstm: QuantLSTM) -> list[tuple[Rows, Rows]]:
    if disabled := [child for child, quantizer in named_quantizers(lstm) if not quantizer.is_enabled]:
        raise ExportError(
            f"{name}: expected all quantizers of an LSTM with quantized hidden states enabled, as DynamicQuantizeLSTM "
            f"quantizes everything, got {', '.join(disabled)} disabled. Enable them, or disable _hidden_quantizer too"
        )
    quantizers = dict(lstm.weight_quantizers())
    suffixes = ("", "_reverse")[: 2 if lstm.bidirectional else 1]
    stacked = []
    for index in range(lstm.num_layers):
        names = [[f"weight_{of}_l{index}{suffix}" for suffix in suffixes] for of in ("ih", "hh")]
        w, r = ([_rows(f"{name}.{n}", quantizers[n], getattr(lstm, n).detach()) for n in pair] for pair in names)
        stacked.append((_below_each_other(w), _below_each_other(r)))
    return stacked


def _rows(name: str, quantizer: TensorQuantizer, weight: Tensor) -> Rows:
    grid = quantizer.descriptor
    if not (grid.is_float or grid.affine or grid.block_size or container(*quantizer.bounds)[0] != torch.int8):
        codes, scale, _ = quantizer.codes_of(weight)
        if scale.numel() == 1 or scale.shape == (len(weight), 1):
            scale = scale.reshape(-1).expand(len(weight))
            return Rows(in_onnx_order("LSTM", codes.to(torch.int8)), in_onnx_order("LSTM", scale))
    raise ExportError(
        f"{name}: expected int8 codes without zero point, with one scale for each output channel or for all, as "
        f"DynamicQuantizeLSTM reads them, got {grid}"
    )


def _below_each_other(directions: list[Rows]) -> Rows:
    return Rows(torch.cat([rows.codes for rows in directions]), torch.cat([rows.scale for rows in directions]))
