"""Where a file is going to run: one file a target, each registered in one place."""

from fakequant.export.targets import tensorrt
from fakequant.export.targets.target import Target, target_named

__all__ = ["Target", "target_named", "tensorrt"]
