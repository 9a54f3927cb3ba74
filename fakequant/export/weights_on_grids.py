"""The weights of recurrent layers go into a file as floats on their grids, not as integers behind a DequantizeLinear.

No runtime computes LSTM, GRU or RNN in integers, so ONNX Runtime would dequantize the weights
in every run: 1.1 to 6 times the time of the float layer (measured, 1.31 on a CPU, 1 to 128 steps).
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fakequant.nn import TensorQuantizer
from fakequant.nn.modules.quant_module import quantizer_name
from fakequant.nn.modules.recurrent import QuantRecurrent


@contextlib.contextmanager
def weights_on_grids(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> Iterator[frozenset[str]]:
    """Let recurrent layers have their quantized weights as parameters, and no weight quantizers, for a with block.

    Args:
        model: its quantizers are as they should be exported.
        quantizers: by name, those that are in use.

    Yields:
        The names of the quantizers whose weights are on their grids.
    """
    names = {quantizer: name for name, quantizer in quantizers.items()}
    layers = (module for module in model.modules() if isinstance(module, QuantRecurrent))
    found = [(layer, *weight) for layer in layers for weight in layer.weight_quantizers() if weight[1] in names]
    originals = [layer._parameters[name] for layer, name, _ in found]
    with torch.no_grad():
        values = [quantizer(original) for (*_, quantizer), original in zip(found, originals, strict=True)]
    try:
        for (layer, name, _), value in zip(found, values, strict=True):
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
            layer._modules[quantizer_name(name)] = nn.Identity()
        yield frozenset(names[quantizer] for *_, quantizer in found)
    finally:
        for (layer, name, quantizer), original in zip(found, originals, strict=True):
            layer._parameters[name] = original
            layer._modules[quantizer_name(name)] = quantizer
