"""Quantized modules, under the names of the ancestor: ``QuantConv2d``, and ``Conv2d`` for short."""

from fakequant.nn import functional
from fakequant.nn.modules.activation import (
    QuantCELU,
    QuantELU,
    QuantGELU,
    QuantGLU,
    QuantHardshrink,
    QuantHardsigmoid,
    QuantHardswish,
    QuantHardtanh,
    QuantLeakyReLU,
    QuantLogSigmoid,
    QuantLogSoftmax,
    QuantMish,
    QuantPReLU,
    QuantReLU,
    QuantReLU6,
    QuantRReLU,
    QuantSELU,
    QuantSigmoid,
    QuantSiLU,
    QuantSoftmax,
    QuantSoftmax2d,
    QuantSoftmin,
    QuantSoftplus,
    QuantSoftshrink,
    QuantSoftsign,
    QuantTanh,
    QuantTanhshrink,
    QuantThreshold,
)
from fakequant.nn.modules.bilinear import QuantBilinear
from fakequant.nn.modules.clip import Clip
from fakequant.nn.modules.conv import QuantConv1d, QuantConv2d, QuantConv3d
from fakequant.nn.modules.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from fakequant.nn.modules.embedding import QuantEmbedding, QuantEmbeddingBag
from fakequant.nn.modules.instance_norm import QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d
from fakequant.nn.modules.linear import QuantLinear, QuantNonDynamicallyQuantizableLinear
from fakequant.nn.modules.norm import (
    QuantBatchNorm1d,
    QuantBatchNorm2d,
    QuantBatchNorm3d,
    QuantGroupNorm,
    QuantLayerNorm,
    QuantLocalResponseNorm,
    QuantRMSNorm,
    QuantSyncBatchNorm,
)
from fakequant.nn.modules.pooling import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAdaptiveMaxPool1d,
    QuantAdaptiveMaxPool2d,
    QuantAdaptiveMaxPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
    QuantFractionalMaxPool2d,
    QuantFractionalMaxPool3d,
    QuantLPPool1d,
    QuantLPPool2d,
    QuantLPPool3d,
    QuantMaxPool1d,
    QuantMaxPool2d,
    QuantMaxPool3d,
)
from fakequant.nn.modules.quant_attention import QuantMultiheadAttention
from fakequant.nn.modules.quant_module import QuantInputMixin, QuantizedInputForward, QuantMixin, checked_grid
from fakequant.nn.modules.recurrent import QuantGRU, QuantLSTM, QuantRNN
from fakequant.nn.modules.recurrent_cells import QuantGRUCell, QuantLSTMCell, QuantRNNCell
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.registry import quantized_class_of, register, registered, why_unreachable

Conv1d = QuantConv1d
Conv2d = QuantConv2d
Conv3d = QuantConv3d
ConvTranspose1d = QuantConvTranspose1d
ConvTranspose2d = QuantConvTranspose2d
ConvTranspose3d = QuantConvTranspose3d
Linear = QuantLinear
MaxPool1d = QuantMaxPool1d
MaxPool2d = QuantMaxPool2d
MaxPool3d = QuantMaxPool3d
AvgPool1d = QuantAvgPool1d
AvgPool2d = QuantAvgPool2d
AvgPool3d = QuantAvgPool3d
AdaptiveAvgPool1d = QuantAdaptiveAvgPool1d
AdaptiveAvgPool2d = QuantAdaptiveAvgPool2d
AdaptiveAvgPool3d = QuantAdaptiveAvgPool3d
LSTM = QuantLSTM
LSTMCell = QuantLSTMCell
GRU = QuantGRU
GRUCell = QuantGRUCell
RNN = QuantRNN
RNNCell = QuantRNNCell
Bilinear = QuantBilinear
Embedding = QuantEmbedding
EmbeddingBag = QuantEmbeddingBag
MultiheadAttention = QuantMultiheadAttention

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Bilinear",
    "Clip",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiheadAttention",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAdaptiveMaxPool1d",
    "QuantAdaptiveMaxPool2d",
    "QuantAdaptiveMaxPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantBatchNorm1d",
    "QuantBatchNorm2d",
    "QuantBatchNorm3d",
    "QuantBilinear",
    "QuantCELU",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantELU",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantFractionalMaxPool2d",
    "QuantFractionalMaxPool3d",
    "QuantGELU",
    "QuantGLU",
    "QuantGRU",
    "QuantGRUCell",
    "QuantGroupNorm",
    "QuantHardshrink",
    "QuantHardsigmoid",
    "QuantHardswish",
    "QuantHardtanh",
    "QuantInputMixin",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
    "QuantLPPool1d",
    "QuantLPPool2d",
    "QuantLPPool3d",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLayerNorm",
    "QuantLeakyReLU",
    "QuantLinear",
    "QuantLocalResponseNorm",
    "QuantLogSigmoid",
    "QuantLogSoftmax",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantMish",
    "QuantMixin",
    "QuantMultiheadAttention",
    "QuantNonDynamicallyQuantizableLinear",
    "QuantPReLU",
    "QuantRMSNorm",
    "QuantRNN",
    "QuantRNNCell",
    "QuantRReLU",
    "QuantReLU",
    "QuantReLU6",
    "QuantSELU",
    "QuantSiLU",
    "QuantSigmoid",
    "QuantSoftmax",
    "QuantSoftmax2d",
    "QuantSoftmin",
    "QuantSoftplus",
    "QuantSoftshrink",
    "QuantSoftsign",
    "QuantSyncBatchNorm",
    "QuantTanh",
    "QuantTanhshrink",
    "QuantThreshold",
    "QuantizedInputForward",
    "RNNCell",
    "TensorQuantizer",
    "checked_grid",
    "functional",
    "quantized_class_of",
    "register",
    "registered",
    "why_unreachable",
]
