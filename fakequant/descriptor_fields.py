"""The fields of a QuantDescriptor: each checked once and brought to its canonical, hashable form."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fakequant.errors import InvalidTypeError, InvalidValueError


class FloatFormat(NamedTuple):
    """A float format of few bits.

    Attributes:
        max: its largest finite value.
        largest_exponent: of its largest power of two.
        dtype: torch's; None for FP4, which torch has no conversion to.
    """

    max: float
    largest_exponent: int
    dtype: torch.dtype | None


FLOAT_FORMATS = {
    (4, 3): FloatFormat(448.0, 8, torch.float8_e4m3fn),
    (5, 2): FloatFormat(57344.0, 15, torch.float8_e5m2),
    (2, 1): FloatFormat(6.0, 2, None),
}
"""The formats by ``num_bits``: (exponent bits, mantissa bits)."""

MIN_BITS, MAX_BITS = 2, 16

TOKENS = "tokens"
"""``axis`` of one range for each vector along the last axis, whatever the number of axes."""

SCALE_FORMATS = ("float32", "power_of_two", "e8m0", "e4m3")

LEARNED = ("pact", "lsq", "lsq+")
"""Methods that train the range by gradient."""

UNIFORM = "uniform"
"""The scheme whose scale comes from a range, not from the tensor by a paper's formula."""

NestedFloats: TypeAlias = float | tuple[Any, ...]


def checked_mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping of fields, such as JSON gives it."""
    if not isinstance(value, Mapping):
        raise InvalidTypeError(f"QuantDescriptor: expected a mapping of fields, got {type(value).__name__}")
    return value


def checked_num_bits(num_bits: object, scheme: str) -> int | tuple[int, int]:
    """Return an int, or one of FLOAT_FORMATS."""
    lowest = MIN_BITS if scheme == UNIFORM else 1
    expected = f"{lowest} to {MAX_BITS} or one of {sorted(FLOAT_FORMATS)}"
    if isinstance(num_bits, list | tuple):
        found = tuple(num_bits)
        if found in FLOAT_FORMATS:
            return found
        raise InvalidValueError(f"num_bits: expected {expected}, got {num_bits}")
    if isinstance(num_bits, bool) or not isinstance(num_bits, int | np.integer):
        raise InvalidTypeError(f"num_bits: expected an int or one of {sorted(FLOAT_FORMATS)}, got {num_bits!r}")
    if not lowest <= num_bits <= MAX_BITS:
        raise InvalidValueError(f"num_bits: expected {expected}, got {num_bits}")
    return int(num_bits)


def checked_axis(axis: object) -> int | tuple[int, ...] | str | None:
    """Return None, an int, a tuple of different ints, or TOKENS."""
    if axis is None or axis == TOKENS:
        return TOKENS if axis else None
    if isinstance(axis, int | np.integer) and not isinstance(axis, bool):
        return int(axis)
    problem = f"axis: expected None, an int, a tuple of ints or {TOKENS!r}, got {axis!r}"
    if not isinstance(axis, Iterable) or isinstance(axis, str):
        raise InvalidTypeError(problem)
    axes = tuple(axis)
    if not all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in axes):
        raise InvalidTypeError(problem)
    if not axes or len(set(axes)) != len(axes):
        raise InvalidValueError(f"axis: expected one or more different axes, got {axes}")
    return tuple(int(a) for a in axes)


def checked_block_size(block_size: object) -> int | None:
    """Return None, or a size of 2 or more."""
    if block_size is None:
        return None
    if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer):
        raise InvalidTypeError(f"block_size: expected an int or None, got {block_size!r}")
    if block_size < 2:
        raise InvalidValueError(f"block_size: expected 2 or more, got {block_size}")
    return int(block_size)


def checked_learn_amax(learn_amax: object) -> bool | str:
    """Return False or the name of a method; True is what the ancestor had for PACT."""
    if learn_amax is True:
        return "pact"
    if learn_amax is not False and learn_amax not in LEARNED:
        raise InvalidTypeError(f"learn_amax: expected a bool or one of {list(LEARNED)}, got {learn_amax!r}")
    return learn_amax


def checked_amax(amax: object) -> NestedFloats | None:
    """Round amax to float32 and turn it into nested tuples, which hash and compare."""
    if amax is None:
        return None
    problem = f"amax: expected a number, sequence, array or tensor, got {amax!r}"
    if isinstance(amax, torch.Tensor):
        amax = amax.detach().cpu()
        amax = (amax.double() if amax.is_floating_point() else amax).numpy()
    try:
        given = np.asarray(amax)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(problem) from error
    if given.dtype.kind not in "fiu":
        raise InvalidTypeError(problem)
    with np.errstate(over="ignore"):  # to Inf, which is refused next
        array = given.astype(np.float32)
    if array.size == 0 or not np.isfinite(array).all() or (array < 0).any():
        raise InvalidValueError(f"amax: expected finite values >= 0, at least one, got {amax}")
    return _as_tuples(array.tolist())


def _as_tuples(value: Any) -> NestedFloats:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else float(value)


def checked_scale_amax(scale_amax: object) -> float | None:
    """Return None or a finite factor above 0."""
    if scale_amax is None:
        return None
    if isinstance(scale_amax, bool) or not isinstance(scale_amax, int | float | np.number):
        raise InvalidTypeError(f"scale_amax: expected a number or None, got {scale_amax!r}")
    if not (np.isfinite(scale_amax) and scale_amax > 0):
        raise InvalidValueError(f"scale_amax: expected a finite value > 0, got {scale_amax}")
    return float(scale_amax)


def conflict(fields: Mapping[str, Any]) -> str:
    """Return which fields exclude each other, as "field: expected ..., got ...", "" if none do."""
    is_float, blocks = isinstance(fields["num_bits"], tuple), fields["block_size"] is not None
    shifts = fields["scale_format"] == "power_of_two"
    affine, dynamic, learn_amax, scheme = (fields[name] for name in ("affine", "dynamic", "learn_amax", "scheme"))
    plain = {"unsigned": False, "narrow_range": False, "fake_quant": True, "affine": False, "learn_amax": False}
    fixed = {"amax": None, "learn_amax": False}
    histograms = fields["calib_method"] == "histogram"  # of which each takes 32 KiB
    rules: list[tuple[bool, str, Mapping[str, object]]] = [
        (is_float, f"num_bits {fields['num_bits']}", plain),
        (is_float and shifts, f"num_bits {fields['num_bits']}", {"scale_format": "float32"}),
        (affine, "affine=True", {"narrow_range": False, "scale_format": "float32", "fake_quant": True}),
        (dynamic, "dynamic=True", fixed),
        (fields["axis"] == TOKENS, f"axis {TOKENS!r}", {"dynamic": True, "block_size": None}),
        (blocks, "block_size", {"axis": None, "fake_quant": True, "learn_amax": False, "amax": None}),
        (blocks and histograms, "block_size", {"calib_method": "max"}),
        (learn_amax == "lsq+", "learn_amax 'lsq+'", {"affine": True}),
        (learn_amax in ("pact", "lsq"), f"learn_amax {learn_amax!r}", {"affine": False, "scale_format": "float32"}),
        (fields["scale_format"] == "e4m3", "scale_format 'e4m3'", {"num_bits": (2, 1)}),
        (scheme != UNIFORM, f"scheme {scheme!r}", {**plain, **fixed, "dynamic": False, "scale_format": "float32"}),
        (scheme != UNIFORM, f"scheme {scheme!r}", {"scale_amax": None}),
    ]
    for applies, what, expected in rules:
        wrong = {name: value for name, value in expected.items() if fields[name] != value} if applies else {}
        if wrong:
            wanted = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            return f"{what}: expected {wanted}, got {', '.join(repr(fields[name]) for name in wrong)}"
    if fields["scale_format"] in ("e8m0", "e4m3") and not blocks:
        return f"scale_format {fields['scale_format']!r}: expected a block_size, got None"
    return ""
