"""One instance of every class that has a quantized class, and what it is called with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Inputs = tuple[Tensor, ...]

EXAMPLES: dict[type[nn.Module], tuple[tuple[Any, ...], Callable[[], Inputs]]] = {}


def _add(names: str, args: tuple[Any, ...], *shapes: tuple[int, ...]) -> None:
    for name in names.split():
        EXAMPLES[getattr(nn, name)] = args, lambda: tuple(torch.randn(shape) for shape in shapes)


def _rows() -> Inputs:
    return (torch.randint(0, 64, (2, 6)),)


for _d in (1, 2, 3):
    _image = (2, 16, *[8] * _d)
    _add(f"Conv{_d}d ConvTranspose{_d}d", (16, 16, 3), _image)
    _add(f"MaxPool{_d}d AvgPool{_d}d AdaptiveAvgPool{_d}d AdaptiveMaxPool{_d}d", (2,), _image)
    _add(f"LPPool{_d}d", (2, 2), _image)
    _add(f"InstanceNorm{_d}d BatchNorm{_d}d", (16,), _image)
_add("FractionalMaxPool2d", (2, 3), (2, 16, 8, 8))
_add("FractionalMaxPool3d", (2, 3), (2, 16, 8, 8, 8))
_add("Linear", (32, 32), (4, 32))
EXAMPLES[NonDynamicallyQuantizableLinear] = (32, 32), lambda: (torch.randn(4, 32),)
_add("Bilinear", (16, 16, 8), (4, 16), (4, 16))
_add("MultiheadAttention", (32, 2), *[(6, 2, 32)] * 3)
EXAMPLES[nn.Embedding] = EXAMPLES[nn.EmbeddingBag] = (64, 32), _rows
_add("LSTM GRU RNN", (16, 8), (6, 2, 16))
_add("LSTMCell GRUCell RNNCell", (16, 8), (2, 16))
_add("LayerNorm RMSNorm", (32,), (2, 6, 32))
_add("GroupNorm", (2, 16), (2, 16, 8))
_add("LocalResponseNorm", (2,), (2, 16, 8, 8))
_add("SyncBatchNorm", (16,), (2, 16, 8))
_add("CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU", (), (2, 16))
_add("ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink", (), (2, 16))
_add("GLU LogSoftmax Softmax Softmin", (-1,), (2, 16))
_add("Softmax2d", (), (2, 4, 3, 3))
_add("Threshold", (0.1, -1.0), (2, 16))
