"""Where a file is going to run: one file a target, each registered in one place."""

from fakequant.export.targets import onnxruntime, onnxruntime_cuda, tensorrt, tensorrt_ep
from fakequant.export.targets.target import Target, target_named

__all__ = ["Target", "onnxruntime", "onnxruntime_cuda", "target_named", "tensorrt", "tensorrt_ep"]
