"""Quantize and dequantize in one differentiable step, in eager mode, compiled, and under ONNX export."""

from fakequant.fake_quantize.uniform import StraightThrough, fake_quantize, fake_quantize_e4m3, straight_through

__all__ = ["StraightThrough", "fake_quantize", "fake_quantize_e4m3", "straight_through"]
