"""QuantDescriptor: the grid that one tensor is quantized to, as an immutable value.

The nine presets at the end are the ones that users of NVIDIA's
pytorch-quantization know. Weight presets clamp to [-127, 127] (``narrow_range``),
activations to [-128, 127], because that is what ONNX QuantizeLinear does.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from fakequant.errors import InvalidTypeError, InvalidValueError, MissingDependencyError

FP8_E4M3 = (4, 3)
"""``num_bits`` of the 8-bit float format with 4 exponent and 3 mantissa bits."""

MIN_BITS, MAX_BITS = 2, 16

NestedFloats: TypeAlias = float | tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class QuantDescriptor:
    """How one tensor is quantized: number of levels, range, and which axes keep their own range.

    The grid is symmetric with zero point 0: ``scale = amax / bound`` where bound is
    127 for 8 bits, 255 for unsigned 8 bits.

    Args:
        num_bits: 2 to 16, or ``(4, 3)`` for FP8 E4M3.
        name: free text, shown in ``str()``.
        fake_quant: ``True``: the quantizer returns dequantized floats. ``False``: it returns
            the integer codes (as floats) and keeps their scale.
        axis: axis or axes that KEEP their own amax (numpy's ``axis`` is the opposite);
            ``None`` for one amax per tensor. Negative axes count from the end.
        amax: fixed range, largest absolute value on the grid. A number, or nested
            sequences, array or tensor shaped to broadcast against the data.
        learn_amax: train amax by gradient (PACT's clipping gradient); per tensor only.
        scale_amax: factor on amax wherever it is used; must be positive.
        calib_method: name of the calibrator, ``"max"`` or ``"histogram"``.
        unsigned: levels 0 to ``2**num_bits - 1``, for data that is never negative.
        narrow_range: leave out the lowest level, so that the grid is symmetric about 0.

    Raises:
        InvalidTypeError: an argument of the wrong type; says expected and got.
        InvalidValueError: an argument out of range; says expected and got.

    >>> weight = QuantDescriptor(num_bits=8, axis=0, narrow_range=True)
    >>> str(weight)
    'QuantDescriptor(8bit narrow fake axis=0)'
    >>> QuantDescriptor.from_json(weight.to_json()) == weight
    True
    """

    num_bits: int | tuple[int, int] = 8
    name: str | None = None
    _: dataclasses.KW_ONLY
    fake_quant: bool = True
    axis: int | tuple[int, ...] | None = None
    amax: NestedFloats | None = None
    learn_amax: bool = False
    scale_amax: float | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        """Check every field once and bring it to its canonical, hashable form."""
        _set = object.__setattr__
        _set(self, "num_bits", _checked_num_bits(self.num_bits))
        _set(self, "axis", _checked_axis(self.axis))
        _set(self, "amax", _checked_amax(self.amax))
        _set(self, "scale_amax", _checked_scale_amax(self.scale_amax))
        if self.name is not None and not isinstance(self.name, str):
            raise InvalidTypeError(f"name: expected str or None, got {self.name!r}")
        if not isinstance(self.calib_method, str):
            raise InvalidTypeError(f"calib_method: expected str, got {self.calib_method!r}")
        for field in ("fake_quant", "learn_amax", "unsigned", "narrow_range"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidTypeError(f"{field}: expected bool, got {getattr(self, field)!r}")
        if self.learn_amax and self.axis is not None:
            raise InvalidTypeError(f"learn_amax: expected axis None (per tensor), got axis {self.axis}")
        if self.learn_amax and np.size(np.asarray(self.amax)) > 1:
            raise InvalidValueError(f"learn_amax: expected one amax (per tensor), got {self.amax}")
        if self.is_fp8 and (self.unsigned or self.narrow_range or not self.fake_quant):
            raise InvalidValueError(
                "num_bits (4, 3): expected unsigned=False, narrow_range=False, fake_quant=True, "
                f"got {self.unsigned}, {self.narrow_range}, {self.fake_quant}"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether the grid is FP8 E4M3 instead of integers."""
        return self.num_bits == FP8_E4M3

    @property
    def axes(self) -> tuple[int, ...]:
        """The kept axes as a tuple; empty for one range per tensor."""
        if self.axis is None:
            return ()
        return (self.axis,) if isinstance(self.axis, int) else self.axis

    def replace(self, **changes: Any) -> "QuantDescriptor":
        """Return a copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def dict(self) -> dict[str, Any]:
        """Return ``num_bits``, ``name`` and every field that is not at its default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in {"num_bits", "name"} or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "QuantDescriptor":
        """Build a descriptor from what ``dict()`` returned; an unknown key is an error."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise InvalidValueError(f"QuantDescriptor: expected keys among {known}, got {unknown}")
        return cls(**fields)

    def to_json(self) -> str:
        """Return JSON that ``from_json`` reads back to an equal descriptor."""
        return json.dumps(self.dict())

    @classmethod
    def from_json(cls, text: str) -> "QuantDescriptor":
        """Read what ``to_json`` wrote."""
        return cls.from_dict(_mapping(json.loads(text)))

    def to_yaml(self) -> str:
        """Return YAML that ``from_yaml`` reads back to an equal descriptor."""
        # JSON is a subset of YAML and json needs no third package.
        return self.to_json() + "\n"

    @classmethod
    def from_yaml(cls, text: str) -> "QuantDescriptor":
        """Read YAML: our own, or block style as the ancestor wrote it."""
        # JSON first: YAML 1.1 reads 1e-05 as a string and splits the JSON escape of an emoji.
        try:
            return cls.from_json(text)
        except json.JSONDecodeError:
            try:
                import yaml
            except ImportError as error:
                raise MissingDependencyError("pyyaml", "test") from error
            return cls.from_dict(_mapping(yaml.safe_load(text)))

    def __str__(self) -> str:
        """Return the one-line form that users of the ancestor know."""
        parts = [f"{self.name}: " if self.name else "", "(" if self.name else "QuantDescriptor("]
        words = [
            "unsigned" if self.unsigned else "",
            f"{self.num_bits}bit",
            "narrow" if self.narrow_range else "",
            "fake" if self.fake_quant else "real",
            "per-tensor" if self.axis is None else f"axis={self.axis}",
            "" if self.amax is None else f"amax={self.amax}",
            "" if self.scale_amax is None else f"scale_amax={self.scale_amax}",
            "learn_amax" if self.learn_amax else "",
        ]
        return "".join(parts) + " ".join(filter(None, words)) + ")"


ScaledQuantDescriptor = QuantDescriptor


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidTypeError(f"QuantDescriptor: expected a mapping of fields, got {type(value).__name__}")
    return value


def _checked_num_bits(num_bits: object) -> int | tuple[int, int]:
    if isinstance(num_bits, list | tuple):
        if tuple(num_bits) == FP8_E4M3:
            return FP8_E4M3
        raise InvalidValueError(f"num_bits: expected {MIN_BITS} to {MAX_BITS} or (4, 3), got {num_bits}")
    if isinstance(num_bits, bool) or not isinstance(num_bits, int | np.integer):
        raise InvalidTypeError(f"num_bits: expected an int or (4, 3), got {num_bits!r}")
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise InvalidValueError(f"num_bits: expected {MIN_BITS} to {MAX_BITS} or (4, 3), got {num_bits}")
    return int(num_bits)


def _checked_axis(axis: object) -> int | tuple[int, ...] | None:
    if axis is None:
        return None
    if isinstance(axis, int | np.integer) and not isinstance(axis, bool):
        return int(axis)
    if not isinstance(axis, Iterable) or isinstance(axis, str):
        raise InvalidTypeError(f"axis: expected None, an int or a tuple of ints, got {axis!r}")
    axes = tuple(axis)
    if not all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in axes):
        raise InvalidTypeError(f"axis: expected None, an int or a tuple of ints, got {axis!r}")
    if not axes or len(set(axes)) != len(axes):
        raise InvalidValueError(f"axis: expected one or more different axes, got {axes}")
    return tuple(int(a) for a in axes)


def _checked_amax(amax: object) -> NestedFloats | None:
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


def _checked_scale_amax(scale_amax: object) -> float | None:
    if scale_amax is None:
        return None
    if isinstance(scale_amax, bool) or not isinstance(scale_amax, int | float | np.number):
        raise InvalidTypeError(f"scale_amax: expected a number or None, got {scale_amax!r}")
    if not (np.isfinite(scale_amax) and scale_amax > 0):
        raise InvalidValueError(f"scale_amax: expected a finite value > 0, got {scale_amax}")
    return float(scale_amax)


QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
