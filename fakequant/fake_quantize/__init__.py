"""Quantize and dequantize in one differentiable step, in eager mode, compiled, and under ONNX export."""

from fakequant.fake_quantize.affine import fake_quantize_affine
from fakequant.fake_quantize.floats import fake_quantize_float
from fakequant.fake_quantize.on_grid import fake_quantize_learned, fake_quantize_on
from fakequant.fake_quantize.recompute import keep, recompute_quantized
from fakequant.fake_quantize.ste import straight_through
from fakequant.fake_quantize.uniform import fake_quantize

__all__ = [
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_float",
    "fake_quantize_learned",
    "fake_quantize_on",
    "keep",
    "recompute_quantized",
    "straight_through",
]
