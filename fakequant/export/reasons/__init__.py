"""Why ONNX Runtime CPU has no integer kernel for an op between Q and DQ.

They follow the selectors of ONNX Runtime (qdq_selectors.cc, qdq_util.cc,
matmul_add_fusion.cc) on x86-64, and are tested against 1.31.

========  ====================================================
registry  ``@reason`` for one function, and ``reasons_for``
operands  what is in front of an op, and the op itself
behind    what is behind it
product   what is special about Gemm and MatMul
bias      where their bias is
========  ====================================================
"""

from fakequant.export.reasons import behind, operands, product  # noqa: F401  # they register themselves
from fakequant.export.reasons.registry import reasons_for

__all__ = ["reasons_for"]
