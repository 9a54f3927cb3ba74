"""The integers of a quantized model in the open: codes, scales and zero points of weights, and int32 biases."""

from fakequant.integer_state.integers import integer_state
from fakequant.integer_state.state import IntegerState, IntegerTensor

__all__ = ["IntegerState", "IntegerTensor", "integer_state"]
