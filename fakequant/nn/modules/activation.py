"""Quantized activations: the input is quantized, the function and its parameters stay float.

An engine fuses an activation into the layer before it, which a quantizer between the two
prevents, so ``quantize`` leaves all of them float unless a rule asks for one.
"""

from torch import nn

from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.registry import register_on_request


@register_on_request(nn.CELU)
class QuantCELU(QuantizedInputForward, nn.CELU):
    """nn.CELU with a quantized input."""


@register_on_request(nn.ELU)
class QuantELU(QuantizedInputForward, nn.ELU):
    """nn.ELU with a quantized input."""


@register_on_request(nn.GELU)
class QuantGELU(QuantizedInputForward, nn.GELU):
    """nn.GELU with a quantized input."""


@register_on_request(nn.GLU)
class QuantGLU(QuantizedInputForward, nn.GLU):
    """nn.GLU with a quantized input."""


@register_on_request(nn.Hardshrink)
class QuantHardshrink(QuantizedInputForward, nn.Hardshrink):
    """nn.Hardshrink with a quantized input."""


@register_on_request(nn.Hardsigmoid)
class QuantHardsigmoid(QuantizedInputForward, nn.Hardsigmoid):
    """nn.Hardsigmoid with a quantized input."""


@register_on_request(nn.Hardswish)
class QuantHardswish(QuantizedInputForward, nn.Hardswish):
    """nn.Hardswish with a quantized input."""


@register_on_request(nn.Hardtanh)
class QuantHardtanh(QuantizedInputForward, nn.Hardtanh):
    """nn.Hardtanh with a quantized input."""


@register_on_request(nn.LeakyReLU)
class QuantLeakyReLU(QuantizedInputForward, nn.LeakyReLU):
    """nn.LeakyReLU with a quantized input."""


@register_on_request(nn.LogSigmoid)
class QuantLogSigmoid(QuantizedInputForward, nn.LogSigmoid):
    """nn.LogSigmoid with a quantized input."""


@register_on_request(nn.LogSoftmax)
class QuantLogSoftmax(QuantizedInputForward, nn.LogSoftmax):
    """nn.LogSoftmax with a quantized input."""


@register_on_request(nn.Mish)
class QuantMish(QuantizedInputForward, nn.Mish):
    """nn.Mish with a quantized input."""


@register_on_request(nn.PReLU)
class QuantPReLU(QuantizedInputForward, nn.PReLU):
    """nn.PReLU with a quantized input."""


@register_on_request(nn.RReLU)
class QuantRReLU(QuantizedInputForward, nn.RReLU):
    """nn.RReLU with a quantized input."""


@register_on_request(nn.ReLU)
class QuantReLU(QuantizedInputForward, nn.ReLU):
    """nn.ReLU with a quantized input."""


@register_on_request(nn.ReLU6)
class QuantReLU6(QuantizedInputForward, nn.ReLU6):
    """nn.ReLU6 with a quantized input."""


@register_on_request(nn.SELU)
class QuantSELU(QuantizedInputForward, nn.SELU):
    """nn.SELU with a quantized input."""


@register_on_request(nn.SiLU)
class QuantSiLU(QuantizedInputForward, nn.SiLU):
    """nn.SiLU with a quantized input."""


@register_on_request(nn.Sigmoid)
class QuantSigmoid(QuantizedInputForward, nn.Sigmoid):
    """nn.Sigmoid with a quantized input."""


@register_on_request(nn.Softmax)
class QuantSoftmax(QuantizedInputForward, nn.Softmax):
    """nn.Softmax with a quantized input."""


@register_on_request(nn.Softmax2d)
class QuantSoftmax2d(QuantizedInputForward, nn.Softmax2d):
    """nn.Softmax2d with a quantized input."""


@register_on_request(nn.Softmin)
class QuantSoftmin(QuantizedInputForward, nn.Softmin):
    """nn.Softmin with a quantized input."""


@register_on_request(nn.Softplus)
class QuantSoftplus(QuantizedInputForward, nn.Softplus):
    """nn.Softplus with a quantized input."""


@register_on_request(nn.Softshrink)
class QuantSoftshrink(QuantizedInputForward, nn.Softshrink):
    """nn.Softshrink with a quantized input."""


@register_on_request(nn.Softsign)
class QuantSoftsign(QuantizedInputForward, nn.Softsign):
    """nn.Softsign with a quantized input."""


@register_on_request(nn.Tanh)
class QuantTanh(QuantizedInputForward, nn.Tanh):
    """nn.Tanh with a quantized input."""


@register_on_request(nn.Tanhshrink)
class QuantTanhshrink(QuantizedInputForward, nn.Tanhshrink):
    """nn.Tanhshrink with a quantized input."""


@register_on_request(nn.Threshold)
class QuantThreshold(QuantizedInputForward, nn.Threshold):
    """nn.Threshold with a quantized input."""
