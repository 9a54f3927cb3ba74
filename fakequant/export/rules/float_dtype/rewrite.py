"""Give what is not quantized another float type: the strongly typed graph that TensorRT 11 needs.

Every float32 tensor of the graph becomes float16 or bfloat16: inputs, outputs, constants and
what is computed, but for the nodes that have to stay float32 (see Float32Nodes). Q takes
its scale in the type of its data, and DQ gives the type that its readers want, so there is
no Cast beside Q or DQ; a DQ with readers of both types is doubled. Where both types meet
without Q and DQ, there is a Cast.

A scale is rounded like everything else, by 2**-11 of it at most in float16 and 2**-8 in
bfloat16: code 127 then stands for a value 0.06 or 0.5 steps beside what was calibrated. Both
of a pair have the same scale. Stored weights keep their codes.
"""

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from fakequant.errors import InvalidValueError
from fakequant.export.checks.view import PAIR
from fakequant.export.graph import FLOAT_DTYPE_KEY
from fakequant.export.rules.float_dtype.float32_nodes import Float32Nodes
from fakequant.export.rules.float_dtype.float_numbers import FLOAT_NUMBERS
from fakequant.export.rules.float_dtype.type_floats import TypeFloats, place_of

_FIRST_OPSET = 19


def float_rewrites(float_dtype: str, target: str, opset: int) -> tuple[ir.passes.InPlacePass, ...]:
    """Return what gives a graph its float type, after all other rewrites: nothing for float32.

    Raises:
        InvalidValueError: unknown type, or the target or opset has no Q and DQ of that type.
    """
    if float_dtype == "float32":
        return ()
    if float_dtype not in FLOAT_NUMBERS:
        raise InvalidValueError(
            f"float_dtype: expected 'float32' or one of {sorted(FLOAT_NUMBERS)}, got {float_dtype!r}"
        )
    if target == "onnxruntime":
        raise InvalidValueError(
            f"float_dtype: expected 'float32' for target 'onnxruntime', got {float_dtype!r}: ONNX Runtime makes "
            "integer kernels for the CPU only of Q and DQ with float32 scales"
        )
    if opset < _FIRST_OPSET:
        raise InvalidValueError(
            f"opset: expected {_FIRST_OPSET} or later, the first whose scales may be {float_dtype}, got {opset}"
        )
    return (FloatDtype(float_dtype),)


class FloatDtype(ir.passes.InPlacePass):
    """Changes float32 to another type.

    Args:
        float_dtype: ``"float16"`` or ``"bfloat16"``.

    Attributes:
        float32_layers: modules, or nodes that have none, with something that stays float32, {name: reason}.
        clamped_constants: modules or nodes with a constant that the type does not hold, {name: what became of it}.
    """

    def __init__(self, float_dtype: str) -> None:
        super().__init__()
        self._numbers = FLOAT_NUMBERS[float_dtype]
        self.float32_layers: dict[str, str] = {}
        self.clamped_constants: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change; every model is modified."""
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _share_scales(model)
        kept = Float32Nodes(model, self._numbers)
        self.clamped_constants = TypeFloats(model, kept, self._numbers).run()
        for node, reason in kept.nodes.items():
            if reason and node.op_type not in PAIR:
                self.float32_layers.setdefault(place_of(node), reason)
        model.metadata_props[FLOAT_DTYPE_KEY] = str(self._numbers)
        return ir.passes.PassResult(model, modified=True)


def _share_scales(model: ir.Model) -> None:
    """Let a Q and the DQs behind it read one scale."""
    for node in model.graph.all_nodes():
        for reader in node.outputs[0].consumers() if node.op_type == "QuantizeLinear" else ():
            if reader.op_type == "DequantizeLinear":
                reader.replace_input_with(1, node.inputs[1])
