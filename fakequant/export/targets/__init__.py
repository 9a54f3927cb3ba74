"""Where a file is going to run: one file a target, each registered in one place."""

from fakequant.export.targets import onnxruntime, tensorrt
from fakequant.export.targets.target import Target, target_named

__all__ = ["Target", "onnxruntime", "target_named", "tensorrt"]
