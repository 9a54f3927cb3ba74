"""TensorQuantizer: one tensor's quantizer as a module. Its only lasting state is its range (see range_state)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fakequant import arithmetic
from fakequant.descriptor import QuantDescriptor
from fakequant.descriptor_fields import UNIFORM
from fakequant.errors import CalibrationError, ExportError, InvalidTypeError, InvalidValueError
from fakequant.fake_quantize import fake_quantize_learned, fake_quantize_on, keep
from fakequant.nn.modes import is_repeated
from fakequant.nn.modules.grid_view import GridView
from fakequant.nn.modules.range_state import RangeState
from fakequant.nn.modules.switches import Switches
from fakequant.nn.moves import Moves
from fakequant.onnx_ops import is_exporting


class TensorQuantizer(Switches, GridView, RangeState):
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
        InvalidValueError: quant_desc.calib_method is not a registered calibrator; its scheme is none, or
            does not fit its other fields.

    >>> import torch
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
        super().__init__(affine=quant_desc.affine, learned=bool(quant_desc.learn_amax))
        self._init_switches(disabled, if_quant, if_calib)
        self._init_grid(quant_desc)
        self._dynamic_scale: Tensor | None = None
        self.is_weight = False
        """Whether what it quantizes is a weight; set by the module or call site that it belongs to."""
        self.saves_memory = False
        """Whether a training step makes the quantized weight again in backward instead of keeping it."""
        self.momentum: float | None = None
        """In training, how far each call moves the range towards that of its input; None not at all."""
        self._moves = Moves()
        self.grids: dict[str, QuantDescriptor] = {}
        """By target, for a quantizer that was placed; see ``fakequant.retarget``."""

    def _init_grid(self, descriptor: QuantDescriptor) -> None:
        before = getattr(self, "_descriptor", None)
        super()._init_grid(descriptor)
        if descriptor.amax is not None and descriptor.amax != (None if before is None else before.amax):
            self.amax = None
            self.amax = descriptor.amax

    def set_stands_by(self, stands_by: bool) -> None:
        """Say whether only other targets than the present one use it. Its range is not trained while they do."""
        if stands_by != self.stands_by:
            self.stands_by = stands_by
            self._pause_learning(stands_by)

    @property
    def frozen_ends(self) -> list[str]:
        """Names of the ends of a learned range that are not trained, also where it is used."""
        learned = dict(self.named_parameters(recurse=False))
        learning = self._learning if self.stands_by else [end.requires_grad for end in learned.values()]
        return [key for key, is_learning in zip(learned, learning, strict=True) if not is_learning]

    # The scale.

    @property
    def scale(self) -> Tensor | None:
        """ONNX's scale, (amax / maxbound) of a symmetric grid, shaped like amax. None while amax is unknown.

        A dynamic quantizer that returns codes (``fake_quant=False``) has the scale of its last call here.
        """
        parameters = self._grid_parameters()
        return self._dynamic_scale if parameters is None else parameters.scale

    @property
    def zero_point(self) -> Tensor | None:
        """The code of 0 on an affine grid, integers as float32, shaped like amax. None otherwise."""
        parameters = self._grid_parameters()
        return None if parameters is None else parameters.zero_point

    def _grid_parameters(self) -> arithmetic.GridParameters | None:
        if not self.is_calibrated:
            return None
        return arithmetic.grid_parameters(self._descriptor, *self._ends(*self._kept()))

    @property
    def step_size(self) -> Tensor | None:
        """The distance between two values of the grid; the same as ``scale``."""
        return self.scale

    def codes_of(self, tensor: Tensor) -> arithmetic.Codes:
        """Return a tensor, such as a weight, as the codes, scale and zero point that a file stores.

        The scale has the shape of the range, so that of blocks is smaller; see ``arithmetic.over_blocks``.

        Raises:
            InvalidValueError: a float format, which has no codes; amax does not fit the tensor.
        """
        if self._scheme is not None:
            return self._scheme.codes(tensor, self._descriptor)
        return arithmetic.codes_on(self._descriptor, tensor, *self._range_for(tensor))

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
        found = self._calibrator.compute_range(method, percentile=percentile)
        if found is None:
            if strict:
                raise CalibrationError(
                    f"{type(self._calibrator).__name__} has seen no data. Call enable_calib() and feed the model first"
                )
            return
        self.replace_range(*found)

    # The call.

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs quantized (or the codes), or unchanged when quantization is off.

        Raises:
            InvalidTypeError: inputs to be quantized are not floating point.
            InvalidValueError: amax does not fit inputs; gives both shapes.
        """
        if self._disabled or self.stands_by:
            return inputs
        follows = self.momentum is not None and self.training and self.is_to_calibrate and inputs.numel() > 0
        if follows:
            self._follow(inputs)
        if self._if_calib:
            self._calibrator.collect(inputs)
        if not self._if_quant:
            return inputs
        output = self._quantize(inputs)
        if self.is_weight and not self.saves_memory:
            keep(output)
        if follows:
            self._moves.end_with(output)
        return output

    def checked(self, inputs: Tensor) -> Tensor:
        """Return inputs if they can be quantized.

        Raises:
            InvalidTypeError: inputs are not floating point.
            InvalidValueError: amax does not fit inputs; gives both shapes.
        """
        _check_floating(inputs)
        if self.needs_range:
            self._range_for(inputs)
        return inputs

    def train(self, mode: bool = True) -> "TensorQuantizer":
        """Set the mode; what ran before is no part of a step of training."""
        self._moves = Moves()
        return super().train(mode)

    def _follow(self, inputs: Tensor) -> None:
        assert self.momentum is not None
        if is_repeated():
            self._moves.check(str(self))
            return
        self._moves.add()
        self.follow_range(*arithmetic.range_of(self._descriptor, inputs), self.momentum)

    def _quantize(self, inputs: Tensor) -> Tensor:
        _check_floating(inputs)
        grid = self._descriptor
        if self._scheme is not None:
            return self._scheme.fake_quantize(inputs, grid)
        if grid.learn_amax and grid.fake_quant and self.is_calibrated:
            amax, amin = self._scaled(*self._fitted(inputs))
            return fake_quantize_learned(grid, inputs, amax, amin, count=self._count(inputs))
        amax, amin = self._range_for(inputs)
        if grid.fake_quant:
            return fake_quantize_on(grid, inputs, amax, amin)
        codes = arithmetic.codes_on(grid, inputs, amax, amin)
        self._dynamic_scale = None if self.is_calibrated else codes.scale
        return arithmetic.codes_in(codes.codes, inputs.dtype, self.bounds[1])

    def _range_for(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (amax, amin) in use, of a shape that fits inputs."""
        if self._descriptor.dynamic or not self.is_calibrated:
            if self.needs_range and is_exporting():
                raise ExportError(f"expected a calibrated quantizer, got amax unknown in {self}")
            if torch.jit.is_tracing() and is_exporting() and not self.is_weight:
                raise ExportError(
                    "expected torch.onnx.export(dynamo=True) or fakequant.export_onnx, got the TorchScript exporter, "
                    f"which would write the range of the example into the file as a constant: {self}"
                )
            return self._scaled(*arithmetic.range_of(self._descriptor, inputs))
        return self._ends(*self._fitted(inputs))

    def _fitted(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (amax, amin) as they are kept, of a shape that fits inputs."""
        amax, amin = self._kept()
        shape = arithmetic.range_shape(self._descriptor, inputs.shape)
        if amax.shape in (shape, ()):
            return amax, amin
        if [size for size in amax.shape if size != 1] == [size for size in shape if size != 1]:
            return amax.reshape(shape), None if amin is None else amin.reshape(shape)
        raise InvalidValueError(
            f"amax: expected shape {shape} for inputs of shape {tuple(inputs.shape)}, axis {self.axis}, "
            f"got {tuple(amax.shape)}"
        )

    def _ends(self, amax: Tensor, amin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the ends of a range as they are used: of a learned one only the magnitudes count."""
        if self._descriptor.learn_amax:
            amax, amin = amax.abs(), None if amin is None else -amin.abs()
        return self._scaled(amax, amin)

    def _scaled(self, amax: Tensor, amin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self._descriptor.scale_amax
        if factor is None:
            return amax, amin
        return amax * factor, None if amin is None else amin * factor

    def _count(self, inputs: Tensor) -> int:
        """Return how many elements share one step, as LSQ counts: of a weight all, of activations those of a sample."""
        if self.is_weight or isinstance(inputs, nn.Parameter) or inputs.ndim < 2:
            return inputs.numel() // self._amax.numel()
        return math.prod(inputs.shape[1:])

    def extra_repr(self) -> str:
        """Return the line that users of the ancestor know: grid, range, calibrator, switches."""
        if self._disabled or self.stands_by:
            return "disabled" if self._disabled else "stands by for another target"
        descriptor = self._descriptor
        shared = "per-tensor" if self.axis is None else f"axis={self.axis}"
        words = [
            "" if descriptor.scheme == UNIFORM else descriptor.scheme,
            "affine" if descriptor.affine else "",
            "unsigned" if self.unsigned else "",
            f"{self.num_bits}bit",
            "narrow" if self.narrow_range else "",
            "fake" if self.fake_quant else "",
            shared if descriptor.block_size is None else f"blocks={descriptor.block_size}",
            f"amax={self._short_range()}",
            "" if descriptor.scale_amax is None else f"*{descriptor.scale_amax}",
            "learned" if descriptor.learn_amax else "",
            f"calibrator={type(self._calibrator).__name__}",
            "quant" if self._if_quant else "",
            "calib" if self._if_calib else "",
        ]
        return " ".join(filter(None, words))


def _check_floating(inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        raise InvalidTypeError(f"inputs: expected a floating point tensor, got {inputs.dtype}")
