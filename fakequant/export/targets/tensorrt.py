"""TensorRT 8 to 11: int8 with zero point 0, Q/DQ on the inputs of weighted layers only, float bias.

BatchNormalization is folded: TensorRT would fuse it itself, and the folded file is also
what other runtimes need. Opset 19 is the newest that every TensorRT from 10.0 reads.
"""

import onnx_ir as ir

from fakequant.export.rules.float_tables import FloatTables
from fakequant.export.rules.fold_batchnorm import FoldBatchNorm
from fakequant.export.rules.transpose_weights import TransposeWeights
from fakequant.export.targets.target import Target, register


def _rewrites() -> tuple[ir.passes.InPlacePass, ...]:
    return (FloatTables(), TransposeWeights(), FoldBatchNorm())


TENSORRT = register(Target(name="tensorrt", default_opset=19, rewrites=_rewrites))
