"""Quantized models in files: the state, and the manifest that makes a float model the same quantized one."""

from fakequant.checkpoint.file import load_quantized, save_quantized
from fakequant.checkpoint.manifest import manifest_of
from fakequant.checkpoint.restore import quantize_like

__all__ = ["load_quantized", "manifest_of", "quantize_like", "save_quantized"]
