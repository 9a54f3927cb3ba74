"""What a quantizer knows of its grid: the descriptor, and what follows from it without any data."""

from fakequant import arithmetic
from fakequant.calib import Calibrator, calibrator_for
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import UNIFORM
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.schemes import Scheme, scheme_for


class GridView:
    """The descriptor of a quantizer, and its fields as properties."""

    _descriptor: QuantDescriptor
    _scheme: Scheme | None
    _calibrator: Calibrator

    def _init_grid(self, descriptor: QuantDescriptor) -> None:
        self._calibrator = calibrator_for(descriptor)
        self._scheme = None if descriptor.scheme == UNIFORM else scheme_for(descriptor)
        self._descriptor = descriptor

    @property
    def descriptor(self) -> QuantDescriptor:
        """The grid. Assigning another one keeps the range, unless it fixes another, and empties the calibrator."""
        return self._descriptor

    @descriptor.setter
    def descriptor(self, descriptor: QuantDescriptor) -> None:
        if not isinstance(descriptor, QuantDescriptor):
            raise InvalidTypeError(f"descriptor: expected a QuantDescriptor, got {descriptor!r}")
        for field in ("learn_amax", "affine", "block_size", "block_axis"):
            before, now = getattr(self._descriptor, field), getattr(descriptor, field)
            if now != before:
                raise InvalidValueError(f"{field}: expected {before} as at construction, got {now}")
        self._init_grid(descriptor)

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Number of bits of the grid."""
        return self._descriptor.num_bits

    @num_bits.setter
    def num_bits(self, num_bits: int | tuple[int, int]) -> None:
        self.descriptor = self._descriptor.replace(num_bits=num_bits)

    @property
    def unsigned(self) -> bool:
        """Whether the grid starts at 0."""
        return self._descriptor.unsigned

    @unsigned.setter
    def unsigned(self, unsigned: bool) -> None:
        self.descriptor = self._descriptor.replace(unsigned=unsigned)

    @property
    def narrow_range(self) -> bool:
        """Whether the lowest signed code is left out."""
        return self._descriptor.narrow_range

    @narrow_range.setter
    def narrow_range(self, narrow_range: bool) -> None:
        self.descriptor = self._descriptor.replace(narrow_range=narrow_range)

    @property
    def axis(self) -> int | tuple[int, ...] | str | None:
        """The axes that keep their own amax."""
        return self._descriptor.axis

    @property
    def fake_quant(self) -> bool:
        """Whether values (and not codes) are returned."""
        return self._descriptor.fake_quant

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code; an error for a float format, which has none."""
        if self._scheme is not None:
            return self._scheme.bounds(self._descriptor)
        return arithmetic.bounds_of(self._descriptor)

    @property
    def maxbound(self) -> float:
        """The largest value of the grid in units of the scale: 127 for int8, 448 for FP8."""
        return arithmetic.maxbound_of(self._descriptor)

    @property
    def needs_range(self) -> bool:
        """Whether it is calibrated, or has a fixed range; otherwise each tensor gives its own."""
        return not self._descriptor.dynamic and self._scheme is None

    @property
    def is_to_calibrate(self) -> bool:
        """Whether its range comes from data: not fixed by the descriptor, and not of each tensor itself."""
        return self.needs_range and self._descriptor.amax is None
