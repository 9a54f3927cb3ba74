"""ONNX Runtime's CUDA provider: the numbers of the quantized model on a GPU, not its speed.

The provider has no integer kernels: each Q, DQ and float op of the file runs as written,
slower than the float model. It is for comparing; for speed on NVIDIA hardware there are
``tensorrt`` and ``tensorrt-ep``, so the placement is theirs. Its Q and DQ kernels end at
opset 21; newer ones run on the CPU, with copies.

Weights are int8 behind a DQ as for the other targets. ONNX Runtime computes that DQ anew in
each run, also that of ``weights="float"``, unless the session option
``session.disable_quant_qdq`` is 1, which folds it when the file is loaded.
"""

from fakequant.export.targets.target import Target, register
from fakequant.export.targets.tensorrt import TENSORRT

ONNXRUNTIME_CUDA = register(Target(name="onnxruntime-cuda", default_opset=19, rewrites=TENSORRT.rewrites))
