"""TensorQuantizer: one tensor's quantizer as a module. Its only lasting state is amax (see amax_state)."""

from typing import ClassVar

import torch
from torch import Tensor

from fakequant import arithmetic
from fakequant.calib import Calibrator, calibrator_for
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, ExportError, InvalidTypeError, InvalidValueError
from fakequant.fake_quantize import fake_quantize, fake_quantize_e4m3
from fakequant.nn.functional import clip
from fakequant.nn.modules.amax_state import AmaxState
from fakequant.onnx_ops import is_exporting


class TensorQuantizer(AmaxState):
    """Quantizes, observes, or passes on one tensor, of any shape and float dtype.

    With a known amax the grid is fixed; without, each call uses the range of its own
    input ("dynamic"). Switches: ``enable``/``disable`` (everything), ``enable_quant``,
    ``enable_calib`` and their counterparts.

    Args:
        quant_desc: the grid.
        disabled: start as the identity.
        if_quant: start with quantization on.
        if_calib: start collecting statistics.

    Raises:
        InvalidTypeError: quant_desc is no QuantDescriptor.
        InvalidValueError: quant_desc.calib_method is not a registered calibrator.

    >>> quantizer = TensorQuantizer(QuantDescriptor(amax=1.27))
    >>> quantizer(torch.tensor([0.5, -9.0])).tolist()
    [0.5, -1.2799999713897705]
    """

    use_fb_fake_quant: ClassVar[bool] = False
    """Scripts for pytorch-quantization 2.1 set this before export. Every export is standard Q/DQ here."""

    def __init__(
        self,
        quant_desc: QuantDescriptor = QuantDescriptor(),  # noqa: B008 - immutable
        disabled: bool = False,
        if_quant: bool = True,
        if_calib: bool = False,
    ) -> None:
        if not isinstance(quant_desc, QuantDescriptor):
            raise InvalidTypeError(f"quant_desc: expected a QuantDescriptor, got {quant_desc!r}")
        super().__init__(learned=quant_desc.learn_amax)
        self._descriptor = quant_desc
        self._calibrator: Calibrator = calibrator_for(quant_desc)
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_calib = if_calib
        self._dynamic_scale: Tensor | None = None
        self.grids: dict[str, QuantDescriptor] = {}
        """By target, for a quantizer that was placed; see ``fakequant.retarget``."""
        self.stands_by = False
        """Whether only other targets than the present one use it."""
        if quant_desc.amax is not None:
            self.amax = quant_desc.amax

    # The grid.

    @property
    def descriptor(self) -> QuantDescriptor:
        """The grid. Assigning another one keeps amax and empties the calibrator."""
        return self._descriptor

    @descriptor.setter
    def descriptor(self, descriptor: QuantDescriptor) -> None:
        if not isinstance(descriptor, QuantDescriptor):
            raise InvalidTypeError(f"descriptor: expected a QuantDescriptor, got {descriptor!r}")
        if descriptor.learn_amax != self._descriptor.learn_amax:
            raise InvalidValueError(
                f"learn_amax: expected {self._descriptor.learn_amax} as at construction, got {descriptor.learn_amax}"
            )
        self._calibrator = calibrator_for(descriptor)
        self._descriptor = descriptor

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
    def axis(self) -> int | tuple[int, ...] | None:
        """The axes that keep their own amax."""
        return self._descriptor.axis

    @property
    def fake_quant(self) -> bool:
        """Whether values (and not codes) are returned."""
        return self._descriptor.fake_quant

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code; an error for FP8, which has none."""
        bits = self._descriptor.num_bits
        if isinstance(bits, tuple):
            raise InvalidValueError(f"bounds: expected an integer grid, got num_bits {bits}")
        return arithmetic.integer_bounds(bits, self.unsigned, self.narrow_range)

    @property
    def maxbound(self) -> float:
        """The largest value of the grid in units of the scale: 127 for int8, 448 for FP8."""
        return arithmetic.FP8_E4M3_MAX if self._descriptor.is_fp8 else self.bounds[1]

    # The scale.

    def _scaled(self, amax: Tensor) -> Tensor:
        factor = self._descriptor.scale_amax
        return amax if factor is None else amax * factor

    @property
    def scale(self) -> Tensor | None:
        """ONNX's scale, amax / maxbound, shaped like amax. None while amax is unknown.

        A dynamic quantizer that returns codes (``fake_quant=False``) has the scale of its last call here.
        """
        if not self.is_calibrated:
            return self._dynamic_scale
        return arithmetic.scale_from_amax(self._scaled(self._amax), self.maxbound)

    @property
    def step_size(self) -> Tensor | None:
        """The distance between two values of the grid; the same as ``scale``."""
        return self.scale

    # The switches.

    @property
    def is_enabled(self) -> bool:
        """Whether a call changes its input."""
        return self._if_quant and not self._disabled and not self.stands_by

    @property
    def is_active(self) -> bool:
        """Whether a call quantizes or collects statistics."""
        return not self._disabled and not self.stands_by and (self._if_quant or self._if_calib)

    def disable(self) -> None:
        """Become the identity: neither quantize nor collect."""
        self._disabled = True

    def enable(self) -> None:
        """Undo ``disable``."""
        self._disabled = False

    def disable_quant(self) -> None:
        """Stop quantizing."""
        self._if_quant = False

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True

    def disable_calib(self) -> None:
        """Stop collecting statistics."""
        self._if_calib = False

    def enable_calib(self) -> None:
        """Collect statistics from every call."""
        self._if_calib = True

    # Calibration.

    def load_calib_amax(self, method: str | None = None, *, percentile: float = 99.99, strict: bool = True) -> None:
        """Set amax from what was collected.

        Args:
            method: how, for a calibrator that knows several; None for its own default.
            percentile: in percent, for the percentile method.
            strict: raise if nothing was collected; otherwise leave amax as it is.

        Raises:
            CalibrationError: nothing was collected, or NaN, Inf, or negative values on an unsigned grid.
            InvalidValueError: the calibrator does not know the method.
        """
        amax = self._calibrator.compute_amax(method, percentile=percentile)
        if amax is None:
            if strict:
                raise CalibrationError(
                    f"{type(self._calibrator).__name__} has seen no data. Call enable_calib() and feed the model first"
                )
            return
        if self.is_calibrated and amax.shape != self._amax.shape:
            self.amax = None
        self.amax = amax

    # The call.

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs quantized (or the codes), or unchanged when quantization is off.

        Raises:
            InvalidTypeError: inputs to be quantized are not floating point.
            InvalidValueError: amax does not fit inputs; gives both shapes.
        """
        if self._disabled or self.stands_by:
            return inputs
        if self._if_calib:
            self._calibrator.collect(inputs)
        return self._quantize(inputs) if self._if_quant else inputs

    def checked(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is put onto the grid, inputs clipped to a learned range, and amax shaped for it.

        Raises:
            InvalidTypeError: inputs are not floating point.
            InvalidValueError: amax does not fit inputs; gives both shapes.
        """
        if not inputs.is_floating_point():
            raise InvalidTypeError(f"inputs: expected a floating point tensor, got {inputs.dtype}")
        amax = self._scaled(self._amax_for(inputs))
        if self._descriptor.learn_amax and self.is_calibrated:
            # PACT (arXiv:1805.06085): values beyond the range give their gradient to it.
            bound = amax.to(inputs.dtype)
            inputs = clip(inputs, torch.zeros_like(bound) if self.unsigned else -bound, bound)
        return inputs, amax

    def _quantize(self, inputs: Tensor) -> Tensor:
        inputs, amax = self.checked(inputs)
        scale = arithmetic.scale_from_amax(amax, self.maxbound)
        if self._descriptor.is_fp8:
            return fake_quantize_e4m3(inputs, scale)
        if self._descriptor.fake_quant:
            return fake_quantize(inputs, scale, *self.bounds)
        self._dynamic_scale = scale
        return arithmetic.codes_in(arithmetic.quantize(inputs, scale, *self.bounds), inputs.dtype, self.bounds[1])

    def _amax_for(self, inputs: Tensor) -> Tensor:
        if not self.is_calibrated:
            if is_exporting():
                raise ExportError(f"expected a calibrated quantizer, got amax unknown in {self}")
            return arithmetic.reduce_amax(inputs, self.axis)
        shape = arithmetic.kept_shape(inputs.shape, self.axis)
        if self._amax.shape in (shape, ()):
            return self._amax
        if [size for size in self._amax.shape if size != 1] == [size for size in shape if size != 1]:
            return self._amax.reshape(shape)
        raise InvalidValueError(
            f"amax: expected shape {shape} for inputs of shape {tuple(inputs.shape)}, axis {self.axis}, "
            f"got {tuple(self._amax.shape)}"
        )

    def extra_repr(self) -> str:
        """Return the line that users of the ancestor know: grid, range, calibrator, switches."""
        if self._disabled or self.stands_by:
            return "disabled" if self._disabled else "stands by for another target"
        descriptor = self._descriptor
        words = [
            "unsigned" if self.unsigned else "",
            f"{self.num_bits}bit",
            "narrow" if self.narrow_range else "",
            "fake" if self.fake_quant else "",
            "per-tensor" if self.axis is None else f"axis={self.axis}",
            f"amax={self._short_amax()}",
            "" if descriptor.scale_amax is None else f"*{descriptor.scale_amax}",
            "learned" if descriptor.learn_amax else "",
            f"calibrator={type(self._calibrator).__name__}",
            "quant" if self._if_quant else "",
            "calib" if self._if_calib else "",
        ]
        return " ".join(filter(None, words))
