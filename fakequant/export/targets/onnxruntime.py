"""ONNX Runtime on an x86 CPU: uint8 activations, int8 weights, Q behind everything that has an integer kernel.

Opset 20 has Gelu as one op; it and IR 9 are read by every ONNX Runtime from 1.17.
"""

import onnx_ir as ir

from fakequant.export.rules.biases import Biases
from fakequant.export.rules.float8_fences import Float8Fences
from fakequant.export.rules.fold_batchnorm import FoldBatchNorm
from fakequant.export.rules.four_bits import FourBits
from fakequant.export.rules.gather_codes import GatherCodes
from fakequant.export.rules.gemm_products import GemmProducts
from fakequant.export.rules.global_pools import GlobalPools
from fakequant.export.rules.integer_lstms import IntegerLstms
from fakequant.export.rules.integer_products import IntegerProducts
from fakequant.export.rules.norm_sums import NormSums
from fakequant.export.rules.transpose_weights import TransposeWeights
from fakequant.export.rules.unsigned_activations import UnsignedActivations
from fakequant.export.targets.target import Target, register


def _rewrites() -> tuple[ir.passes.InPlacePass, ...]:
    return (
        GatherCodes(),
        TransposeWeights(),
        FoldBatchNorm(),
        UnsignedActivations(),
        GlobalPools(),
        GemmProducts(),
        IntegerProducts(),
        IntegerLstms(),
        FourBits(),
        Biases(),
        Float8Fences(),
        NormSums(),
    )


ONNXRUNTIME = register(Target(name="onnxruntime", default_opset=20, rewrites=_rewrites))
