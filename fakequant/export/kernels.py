"""Which kernels of ONNX Runtime CPU an op of ONNX can become."""

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The op types of an optimized graph that compute one op type of ONNX.

    Args:
        integer: those that compute in integers.
        either: those that take integers or floats; which of them, the data says.
        floating: those that compute in floats.
    """

    integer: frozenset[str]
    either: frozenset[str]
    floating: frozenset[str]

    def rank(self, op_type: str) -> int:
        """Return how well a kernel fits, 0 for not at all: an op can leave several nodes behind."""
        ranks = {3: self.integer, 2: self.either, 1: self.floating}
        return next((rank for rank, kernels in ranks.items() if op_type in kernels), 0)


def _kernels(integer: Collection[str] = (), floating: Collection[str] = (), either: Collection[str] = ()) -> Kernels:
    return Kernels(frozenset(integer), frozenset(either), frozenset(floating))


RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
"""Op types of recurrent layers, which no runtime computes in integers."""

KERNELS = {
    "Conv": _kernels({"ConvInteger", "QLinearConv"}, {"Conv", "FusedConv", "NhwcFusedConv"}),
    "ConvTranspose": _kernels((), {"ConvTranspose"}),
    "Gemm": _kernels({"MatMulNBits", "QGemm"}, {"FusedGemm", "Gemm"}),
    # With the Add of a bias behind it, a MatMul becomes a Gemm.
    "MatMul": _kernels(
        {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearMatMul"},
        {"FusedGemm", "FusedMatMul", "Gemm", "MatMul"},
    ),
    "Add": _kernels({"QLinearAdd"}, {"Add"}),
    "Mul": _kernels({"QLinearMul"}, {"Mul"}),
    "Concat": _kernels({"QLinearConcat"}, (), {"Concat"}),
    "MaxPool": _kernels({"NhwcMaxPool"}, (), {"MaxPool"}),
    "AveragePool": _kernels({"QLinearAveragePool"}, {"AveragePool"}),
    "GlobalAveragePool": _kernels({"QLinearGlobalAveragePool"}, {"GlobalAveragePool"}),
    "ReduceMean": _kernels((), {"ReduceMean"}),
    "Softmax": _kernels({"QLinearSoftmax"}, {"Softmax"}),
    "Sigmoid": _kernels({"QLinearSigmoid"}, {"Sigmoid"}),
    **{op_type: _kernels((), {op_type}) for op_type in sorted(RECURRENT)},
}
"""Op types that are looked at, each with its kernels."""

INTEGER_FORMS: dict[str, frozenset[str]] = {
    "ConvInteger": frozenset(),
    "DynamicQuantizeLSTM": frozenset(),
    "MatMulInteger": frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}),
}
"""Op types of ONNX and ONNX Runtime that multiply integers as written, and what they become besides themselves."""

ONNXRUNTIME_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

KERNELS |= {op_type: _kernels({op_type, *fused}) for op_type, fused in INTEGER_FORMS.items()}

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Op types with a weight, or two operands that are multiplied and summed up."""

INTEGER_OPS = frozenset().union(*(KERNELS[op_type].integer for op_type in (*sorted(WEIGHTED), *INTEGER_FORMS)))
"""Op types of an optimized graph that compute a weighted layer in integers."""
