"""The weights of recurrent layers go into a file as floats on their grids, not as integers behind a DequantizeLinear.

No runtime computes LSTM, GRU or RNN in integers, so ONNX Runtime would dequantize the weights
in every run: 1.1 to 6 times the time of the float layer (measured, 1.31 on a CPU, 1 to 128 steps).
An LSTM that multiplies integers is another operator, and is left as it is; see ``lstm_codes``.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.quant_module import quantizer_name
from fakequant.nn.modules.recurrent import QuantLSTM, QuantRecurrent


@contextlib.contextmanager
def weights_on_grids(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> Iterator[frozenset[str]]:
    """Let recurrent layers have their quantized weights as parameters, and no weight quantizers, for a with block.

    Args:
        model: its quantizers are as they should be exported.
        quantizers: by name, those that are in use.

    Yields:
        The names of the quantizers whose weights are on their grids, or that an operator stands for.
    """
    names = {quantizer: name for name, quantizer in quantizers.items()}
    integers = [module for module in model.modules() if isinstance(module, QuantLSTM) and module.is_in_steps]
    inside = {quantizer for layer in integers for _, quantizer in layer.weight_quantizers()}
    inside |= {layer.hidden_quantizer for layer in integers if layer.hidden_quantizer is not None}
    layers = (module for module in model.modules() if isinstance(module, QuantRecurrent) and module not in integers)
    found = [(layer, *weight) for layer in layers for weight in layer.weight_quantizers() if weight[1] in names]
    originals = [layer._parameters[name] for layer, name, _ in found]
    with torch.no_grad():
        values = [quantizer(original) for (*_, quantizer), original in zip(found, originals, strict=True)]
    try:
        for (layer, name, _), value in zip(found, values, strict=True):
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
            layer._modules[quantizer_name(name)] = nn.Identity()
        yield frozenset(names[quantizer] for quantizer in (*(q for *_, q in found), *(inside & names.keys())))
    finally:
        for (layer, name, quantizer), original in zip(found, originals, strict=True):
            layer._parameters[name] = original
            layer._modules[quantizer_name(name)] = quantizer
