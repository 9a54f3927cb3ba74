"""ONNX Runtime's TensorRT provider: the graph of ``tensorrt``, which it hands to TensorRT's own parser.

What TensorRT does not take runs on the CUDA or CPU provider instead of being refused. An
int32 bias behind DequantizeLinear, fatal to TensorRT, is folded by ONNX Runtime before
(rule R3). Opset 19 to 21: the provider reads Q and DQ as its TensorRT does, and what falls
back to CUDA has kernels for them up to 21.
"""

from fakequant.export.targets.target import Target, register
from fakequant.export.targets.tensorrt import TENSORRT

TENSORRT_EP = register(Target(name="tensorrt-ep", default_opset=TENSORRT.default_opset, rewrites=TENSORRT.rewrites))
