"""Another float type for what is not quantized: float16 or bfloat16.

=============  ====================================================
rewrite        FloatDtype, and for whom it is
float32_nodes  what has to stay float32, and why
float_numbers  which numbers and scales a type holds
type_floats    types, constants and the Casts between two types
op_types       which types ONNX lets an op have
=============  ====================================================
"""

from fakequant.export.rules.float_dtype.rewrite import FloatDtype, float_rewrites

__all__ = ["FloatDtype", "float_rewrites"]
