"""QuantDescriptor: the grid that one tensor is quantized to, as an immutable value.

The nine presets at the end are the ones that users of NVIDIA's
pytorch-quantization know. Weight presets clamp to [-127, 127] (``narrow_range``),
activations to [-128, 127], because that is what ONNX QuantizeLinear does.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fakequant.descriptor_fields import (
    SCALE_FORMATS,
    UNIFORM,
    NestedFloats,
    checked_amax,
    checked_axis,
    checked_block_size,
    checked_learn_amax,
    checked_mapping,
    checked_num_bits,
    checked_scale_amax,
    conflict,
)
from fakequant.errors import InvalidTypeError, InvalidValueError, MissingDependencyError


@dataclasses.dataclass(frozen=True)
class QuantDescriptor:
    """How one tensor is quantized: number of levels, range, and which elements share a range.

    The grid is symmetric with zero point 0, ``scale = amax / bound`` where bound is 127 for
    8 bits, 255 for unsigned 8 bits; an affine one has a zero point.

    Args:
        num_bits: 1 to 16, or a float format: ``(4, 3)`` FP8 E4M3, ``(5, 2)`` FP8 E5M2, ``(2, 1)`` FP4.
            1 is for schemes only.
        name: free text, shown in ``str()``.
        fake_quant: ``True``: the quantizer returns dequantized floats. ``False``: it returns
            the integer codes (as floats) and keeps their scale.
        axis: axis or axes that KEEP their own range (numpy's ``axis`` is the opposite); ``None`` for one
            range per tensor; ``"tokens"`` for one a vector along the last axis. Negative axes count from the end.
        amax: fixed range, largest absolute value on the grid. A number, or nested
            sequences, array or tensor shaped to broadcast against the data.
        learn_amax: train the range by gradient: ``"lsq"``, ``"lsq+"`` (affine) or ``"pact"`` (per tensor),
            which is also what True means.
        scale_amax: factor on the range wherever it is used; must be positive.
        calib_method: name of the calibrator, ``"max"`` or ``"histogram"``.
        unsigned: levels 0 to ``2**num_bits - 1``; without ``affine``, for data that is never negative.
        narrow_range: leave out the lowest level, so that the grid is symmetric about 0.
        affine: the range [amin, amax] need not be symmetric; scale and integer zero point.
        dynamic: the range is that of each call's own tensor; nothing is calibrated.
        block_size: one range for each block of so many elements along ``block_axis``, the last one maybe smaller.
        block_axis: see block_size. All other axes keep their own ranges.
        scale_format: what scales are rounded to: ``"float32"``, ``"power_of_two"`` (TQT), ``"e8m0"``
            (OCP microscaling; MXINT8, MXFP8), ``"e4m3"`` (NVFP4).
        scheme: ``"uniform"``, or the paper whose formula gives the scale from the tensor itself: ``"twn"``,
            ``"bnn"``, ``"xnor"``, ``"dorefa"``; see ``fakequant.schemes``.

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
    axis: int | tuple[int, ...] | str | None = None
    amax: NestedFloats | None = None
    learn_amax: bool | str = False
    scale_amax: float | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False
    affine: bool = False
    dynamic: bool = False
    block_size: int | None = None
    block_axis: int = -1
    scale_format: str = "float32"
    scheme: str = UNIFORM

    def __post_init__(self) -> None:
        """Check every field once and bring it to its canonical, hashable form."""
        _set = object.__setattr__
        for field in ("calib_method", "scale_format", "scheme"):
            if not isinstance(getattr(self, field), str):
                raise InvalidTypeError(f"{field}: expected str, got {getattr(self, field)!r}")
        _set(self, "num_bits", checked_num_bits(self.num_bits, self.scheme))
        _set(self, "axis", checked_axis(self.axis))
        _set(self, "amax", checked_amax(self.amax))
        _set(self, "learn_amax", checked_learn_amax(self.learn_amax))
        _set(self, "scale_amax", checked_scale_amax(self.scale_amax))
        _set(self, "block_size", checked_block_size(self.block_size))
        if self.name is not None and not isinstance(self.name, str):
            raise InvalidTypeError(f"name: expected str or None, got {self.name!r}")
        for field in ("fake_quant", "unsigned", "narrow_range", "affine", "dynamic"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidTypeError(f"{field}: expected bool, got {getattr(self, field)!r}")
        if not isinstance(self.block_axis, int | np.integer) or isinstance(self.block_axis, bool):
            raise InvalidTypeError(f"block_axis: expected an int, got {self.block_axis!r}")
        _set(self, "block_axis", int(self.block_axis))
        if self.scale_format not in SCALE_FORMATS:
            raise InvalidValueError(f"scale_format: expected one of {list(SCALE_FORMATS)}, got {self.scale_format!r}")
        if self.learn_amax == "pact" and self.axis is not None:
            raise InvalidTypeError(f"learn_amax: expected axis None (per tensor), got axis {self.axis}")
        if self.learn_amax == "pact" and np.size(np.asarray(self.amax)) > 1:
            raise InvalidValueError(f"learn_amax: expected one amax (per tensor), got {self.amax}")
        if problem := conflict({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}):
            raise InvalidValueError(problem)

    @property
    def is_float(self) -> bool:
        """Whether the grid is that of a float format instead of integers."""
        return isinstance(self.num_bits, tuple)

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
        """Build a descriptor from what ``dict()`` returned.

        Raises:
            InvalidTypeError, InvalidValueError: an unknown key, or as the constructor.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise InvalidValueError(f"QuantDescriptor: expected keys among {known}, got {unknown}")
        return cls(**fields)

    def to_json(self) -> str:
        """Return JSON that ``from_json`` reads back to an equal descriptor."""
        return json.dumps(self.dict())

    @classmethod
    def from_json(cls, text: str) -> "QuantDescriptor":
        """Read what ``to_json`` wrote.

        Raises:
            InvalidTypeError, InvalidValueError: no JSON, or as ``from_dict``.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidValueError(f"text: expected JSON, got {text!r}: {error}") from error
        return cls.from_dict(checked_mapping(fields))

    def to_yaml(self) -> str:
        """Return YAML that ``from_yaml`` reads back to an equal descriptor."""
        # JSON is a subset of YAML and json needs no third package.
        return self.to_json() + "\n"

    @classmethod
    def from_yaml(cls, text: str) -> "QuantDescriptor":
        """Read YAML: our own, or block style as the ancestor wrote it.

        Raises:
            InvalidTypeError, InvalidValueError: no YAML, or as ``from_dict``.
            MissingDependencyError: block style, without pyyaml.
        """
        # JSON first: YAML 1.1 reads 1e-05 as a string and splits the JSON escape of an emoji.
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            try:
                import yaml
            except ImportError as error:
                raise MissingDependencyError("pyyaml", "test") from error
            try:
                fields = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InvalidValueError(f"text: expected YAML, got {text!r}: {error}") from error
        return cls.from_dict(checked_mapping(fields))

    def __str__(self) -> str:
        """Return the one-line form that users of the ancestor know."""
        parts = [f"{self.name}: " if self.name else "", "(" if self.name else "QuantDescriptor("]
        shared = "per-tensor" if self.axis is None else f"axis={self.axis}"
        words = [
            "" if self.scheme == UNIFORM else self.scheme,
            "dynamic" if self.dynamic else "",
            "affine" if self.affine else "",
            "unsigned" if self.unsigned else "",
            f"{self.num_bits}bit",
            "narrow" if self.narrow_range else "",
            "fake" if self.fake_quant else "real",
            shared if self.block_size is None else f"blocks={self.block_size} along {self.block_axis}",
            "" if self.scale_format == "float32" else f"scale={self.scale_format}",
            "" if self.amax is None else f"amax={self.amax}",
            "" if self.scale_amax is None else f"scale_amax={self.scale_amax}",
            {False: "", "pact": "learn_amax"}.get(self.learn_amax, f"learn_amax={self.learn_amax}"),
        ]
        return "".join(parts) + " ".join(filter(None, words)) + ")"


ScaledQuantDescriptor = QuantDescriptor


QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(8, axis=0, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(8, axis=1, narrow_range=True)
