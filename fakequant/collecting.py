"""Collecting what the quantizers of a model meet, while it runs as the float model that it was."""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from fakequant.calib import Calibrator, calibrator_for
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, FakeQuantError, InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers

_STATISTICS_OF = ("axis", "affine", "block_size", "block_axis")
"""Fields of a grid that say what our own calibrators collect."""


class Collector:
    """Stands in for the calibrator of a quantizer, and gives it each tensor of a forward pass once.

    A quantizer that several layers share meets the same tensor in each of them.

    Args:
        name: of the quantizer, for errors.
        calibrator: that collects.
    """

    def __init__(self, name: str, calibrator: Calibrator) -> None:
        self.name = name
        self.is_called = False
        self._calibrator = calibrator
        self._met: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def collect(self, x: Tensor) -> None:
        """Take in a tensor that was not met before, or was written to since."""
        self.is_called = True
        version = 0 if x.is_inference() else x._version
        known = self._met.get(id(x))
        if known is None or known[0]() is not x or known[1] != version:
            self._met[id(x)] = weakref.ref(x), version
            with naming(self.name):
                self._calibrator.collect(x)

    def forget(self) -> None:
        """Begin another forward: whoever makes batches may fill a buffer again, unseen by torch."""
        self._met.clear()


@contextlib.contextmanager
def collecting(model: nn.Module, calibrators: Mapping[str, Calibrator]) -> Iterator[list[Collector]]:
    """Make the model float for a with block, in which the quantizers {name: calibrator} collect."""
    every = dict(named_quantizers(model))
    switches = [(q, q._disabled, q._if_quant, q._if_calib, q._calibrator) for q in every.values()]
    collectors = [Collector(name, calibrator) for name, calibrator in calibrators.items()]
    try:
        for quantizer in every.values():
            quantizer.disable()
        for collector in collectors:
            quantizer = every[collector.name]
            quantizer._calibrator = collector  # type: ignore[assignment]
            quantizer.enable()
            quantizer.disable_quant()
            quantizer.enable_calib()
        yield collectors
    finally:
        for quantizer, disabled, if_quant, if_calib, calibrator in switches:
            quantizer._disabled, quantizer._if_quant, quantizer._if_calib = disabled, if_quant, if_calib
            quantizer._calibrator = calibrator


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a quantizer in front of the errors of a with block."""
    try:
        yield
    except FakeQuantError as error:
        raise type(error)(f"{name}: {error}") from error


def calibrator_of(name: str, quantizer: TensorQuantizer, method: str) -> Calibrator:
    """Return a fresh calibrator that can serve the method, or the one that the grid asks for; checks the method."""
    grid = quantizer.descriptor
    wanted = method_of(quantizer, method)
    if wanted is None:
        return calibrator_for(grid)
    with naming(name):
        calibrator = calibrator_for(grid.replace(calib_method="max" if wanted == "max" else "histogram"))
        calibrator.compute_range(wanted)
    return calibrator


def method_of(quantizer: TensorQuantizer, method: str) -> str | None:
    """Return the method of a quantizer; a calibrator that is none of our two knows its own.

    "lsq" is where training by LSQ starts, with a range that is far too wide to stay: a range that it does not
    train has "max" instead.
    """
    if not _is_ours(quantizer.descriptor):
        return None
    return "max" if method == "lsq" and not _is_trained_by_lsq(quantizer) else method


def check_lsq(quantizers: Iterable[TensorQuantizer], *methods: str) -> None:
    """Check that there are ranges for the method "lsq", if it is among the methods.

    Raises:
        InvalidValueError: LSQ trains none.
    """
    if "lsq" in methods and not any(_is_trained_by_lsq(quantizer) for quantizer in quantizers):
        raise InvalidValueError("method 'lsq': expected a range that LSQ or LSQ+ trains, got none in the model")


def _is_trained_by_lsq(quantizer: TensorQuantizer) -> bool:
    return quantizer.descriptor.learn_amax in ("lsq", "lsq+")


def put_on_grid(calibrator: Calibrator, quantizer: TensorQuantizer) -> None:
    """Let a calibrator find the range of what it collected on the present grid of a quantizer.

    Raises:
        CalibrationError: what was collected does not serve that grid, or nothing does.
    """
    before, grid = calibrator.descriptor, quantizer.descriptor
    if not quantizer.is_to_calibrate:
        raise CalibrationError(f"expected a grid whose range comes from data, got {grid}")
    fields: Sequence[str] = [field.name for field in dataclasses.fields(grid)]
    if _is_ours(grid) and _is_ours(before):
        grid, fields = grid.replace(calib_method=before.calib_method), _STATISTICS_OF
    for field in fields:
        then, now = getattr(before, field), getattr(grid, field)
        if now != then:
            raise CalibrationError(f"{field}: expected {then!r}, for which data was collected, got {now!r}")
    calibrator.descriptor = grid


def _is_ours(grid: QuantDescriptor) -> bool:
    return grid.calib_method in ("max", "histogram")
