"""Which grids the files of a target hold, and what to use in place of others. One table a target.

Rule numbers are those of TensorRT's parser, see the checks.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping

from fakequant.arithmetic import bounds_of
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import FLOAT_FORMATS, TOKENS, UNIFORM
from fakequant.errors import ExportError
from fakequant.onnx_ops import container
from fakequant.schemes import scheme_for

_AFFINE_OF_CALL = {"num_bits": 8, "unsigned": True, "axis": None, "block_size": None, "scale_amax": None}
"""The one affine grid whose range ONNX computes, in DynamicQuantizeLinear."""

_TENSORRT_BLOCKS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a quantizer in a graph.

    Args:
        grid: of the quantizer.
        stored: shape of the constant that it quantizes, such as a weight; None for an activation.
    """

    grid: QuantDescriptor
    stored: tuple[int, ...] | None

    @property
    def computes_range(self) -> bool:
        """Whether the graph has to find the range itself."""
        return self.grid.dynamic and self.stored is None


@dataclasses.dataclass(frozen=True)
class _Refusal:
    applies: Callable[[Use], bool]
    got: str
    instead: str


_SIMULATED = (
    _Refusal(
        lambda use: use.grid.num_bits == (2, 1) or use.grid.scale_format in ("e8m0", "e4m3"),
        "FP4 or microscaling blocks (MX, NVFP4), which are simulated only",
        "FP8 E4M3, or 4-bit integers in blocks",
    ),
    _Refusal(
        lambda use: use.grid.is_float and use.grid.block_size is not None,
        "FP8 in blocks, which is simulated only",
        "FP8 E4M3 per tensor or channel, or 4-bit integers in blocks",
    ),
    _Refusal(
        lambda use: use.stored is None and use.grid.scheme not in (UNIFORM, "bnn"),
        "a scheme for weights on an activation",
        'a uniform grid there, or scheme="bnn"',
    ),
    _Refusal(
        lambda use: use.stored is None and use.grid.block_size is not None,
        "blocks of an activation, which are simulated only",
        f"one range per tensor, or axis={TOKENS!r}",
    ),
    _Refusal(
        lambda use: use.grid.dynamic and use.grid.is_float,
        "a dynamic range of a float format, for which ONNX has no op",
        "dynamic=False, calibrated, or a dynamic integer grid",
    ),
    _Refusal(
        lambda use: (
            use.computes_range
            and use.grid.affine
            and any(getattr(use.grid, name) != value for name, value in _AFFINE_OF_CALL.items())
        ),
        "a dynamic affine grid that is not uint8 per tensor, or is scaled",
        "QuantDescriptor(8, unsigned=True, affine=True, dynamic=True), or a symmetric grid",
    ),
    _Refusal(
        lambda use: use.computes_range and not use.grid.affine and use.grid.axis not in (None, TOKENS),
        "dynamic ranges along an axis of an activation",
        f"axis=None or axis={TOKENS!r}",
    ),
)

_STATIC_ONLY = (
    _Refusal(
        lambda use: use.computes_range,
        "a dynamic range, which it does not run on the GPU (R12)",
        "dynamic=False, calibrated, or target 'onnxruntime'",
    ),
)

_TENSORRT = (
    *_STATIC_ONLY,
    _Refusal(lambda use: use.grid.affine, "an affine grid: zero points must be 0 (R1)", "affine=False"),
    _Refusal(lambda use: use.grid.num_bits == (5, 2), "FP8 E5M2 (R2)", "FP8 E4M3, num_bits=(4, 3)"),
    _Refusal(lambda use: _needs_16_bits(use.grid), "codes of more than 8 bits (R2)", "8 bits, or 7 of DoReFa"),
    _Refusal(
        lambda use: use.grid.block_size is not None and not _is_block_of_tensorrt(use),
        "blocks that it has no kernel for (R9)",
        f"4 bits in blocks of {' or '.join(map(str, _TENSORRT_BLOCKS))} that divide the axis, or one range per channel",
    ),
)

_REFUSALS = {"tensorrt": _TENSORRT, "tensorrt-ep": _TENSORRT, "onnxruntime-cuda": _STATIC_ONLY, "onnxruntime": ()}


def _is_block_of_tensorrt(use: Use) -> bool:
    grid = use.grid
    fits = grid.num_bits == 4 and not grid.unsigned and grid.block_size in _TENSORRT_BLOCKS
    return fits and use.stored is not None and use.stored[grid.block_axis] % (grid.block_size or 1) == 0


def check_accepted(target: str, uses: Mapping[str, Use]) -> None:
    """Raise ExportError for quantizers {name: use} whose grids no file of the target holds."""
    found: defaultdict[_Refusal, list[str]] = defaultdict(list)
    for name, use in uses.items():
        for refusal in (*_SIMULATED, *_REFUSALS[target]):
            if refusal.applies(use):
                found[refusal].append(f"{name} ({use.grid})")
                break
    if found:
        raise ExportError(
            "; ".join(
                f"target {target!r}: expected {refusal.instead}, got {refusal.got}: {', '.join(names)}"
                for refusal, names in found.items()
            )
        )


def opset_needed(grid: QuantDescriptor) -> int:
    """Return the first opset with a type for the codes, or with blocks; 13 is the first with a channel axis."""
    if grid.block_size is not None:
        return 21
    if grid.num_bits in FLOAT_FORMATS:
        return 19
    return 21 if _needs_16_bits(grid) else 13


def _needs_16_bits(grid: QuantDescriptor) -> bool:
    """Whether 8 bits do not hold the codes; DoReFa's of 8 bits are odd numbers up to 255."""
    if grid.is_float:
        return False
    low, high = bounds_of(grid) if grid.scheme == UNIFORM else scheme_for(grid).bounds(grid)
    return container(low, high)[0].itemsize > 1
