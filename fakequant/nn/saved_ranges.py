"""Whether the range of a quantizer is one that can be saved."""

from fakequant.arithmetic import is_range_shape
from fakequant.errors import CheckpointError
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer


def check_range(name: str, quantizer: TensorQuantizer) -> None:
    """Check the range of a quantizer, if it has one: values may have been written into it from outside.

    Raises:
        CheckpointError: not finite, of the wrong sign, or of a shape that the grid has for no tensor.
    """
    if not quantizer.is_calibrated or quantizer._amax.is_meta:
        return
    for key in quantizer.range_keys:
        end = getattr(quantizer, key)
        if not quantizer._can_be(key, end):
            raise CheckpointError(f"{name}: {key[1:]}: expected finite values of its side of 0, got {end}")
        if not is_range_shape(quantizer.descriptor, end.shape):
            raise CheckpointError(
                f"{name}: {key[1:]}: expected a shape that fits {quantizer.descriptor}, got {tuple(end.shape)}"
            )
