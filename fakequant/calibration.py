"""The calibration loop: data through the float model, statistics into calibrators, ranges into quantizers.

One pass collects what every method needs; ``Calibration.apply`` computes other ranges
from the same statistics. Nothing is written into the model unless every range could be
computed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sized
from typing import Any, TypeAlias

from torch import Tensor, nn
from tqdm import tqdm

from fakequant.arguments import check_count, check_module
from fakequant.arithmetic import DEAD_AMAX
from fakequant.batches import feed
from fakequant.calib import (
    Calibrator,
    DataRange,
    HistogramCalibrator,
    affine_sqnr_db,
    sqnr_db,
)
from fakequant.calib.methods import check_method
from fakequant.calib.percentile import check_percentile
from fakequant.collecting import Collector, calibrator_of, check_lsq, collecting, method_of, put_on_grid
from fakequant.distributed import Alone, Processes, together, without_sharing
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.sharding import reshard, whole
from fakequant.nn.walk import Weight, named_quantizers, weights_of_quantizers
from fakequant.retarget import every_target
from fakequant.shortened import shortened

ALL_PROCESSES = Processes()

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""(model, batch) -> anything; runs the model once on one batch."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of one quantizer.

    Args:
        name: full name of the quantizer.
        amax: float32, shaped as the quantizer keeps it.
        amin: the lower end of an affine grid, shaped alike; None for a symmetric one.
        sqnr_db: signal to quantization noise of the collected data on this grid, the worst
            channel's; None where only the maximum was collected.
        dead_channels: how many of its ranges are numerically zero; their scale is DEAD_SCALE.
    """

    name: str
    amax: Tensor
    amin: Tensor | None
    sqnr_db: float | None
    dead_channels: int


class Calibration:
    """What one pass over the data collected, and the ranges that were computed from it last.

    ``print`` it for a table. It refers to the model and outlives changes of its quantizers' switches.
    """

    def __init__(
        self,
        quantizers: dict[str, TensorQuantizer],
        calibrators: dict[str, Calibrator],
        weights: dict[str, Weight | None],
        num_batches: int,
        model: nn.Module,
    ) -> None:
        self.num_batches = num_batches
        self.method = ""
        self.ranges: tuple[Range, ...] = ()
        self._quantizers = quantizers
        self._calibrators = calibrators
        self._weights = weights
        self._model = model

    def apply(self, method: str, *, weight_method: str = "max", percentile: float = 99.99) -> "Calibration":
        """Compute every range by a method and write it into the quantizers; returns itself.

        Weights are read anew; activations come from what the pass collected.

        Args:
            method: for activations: "max", "entropy", "percentile", "mse", "auto", or "lsq".
            weight_method: for weights: "max", "mse", or "lsq".
            percentile: for that method, above 1 and at most 100.

        Each range is for the present grid of its quantizer, such as one of fewer bits.

        Raises:
            CalibrationError: names every quantizer whose range could not be computed, and why, or that the model
                no longer has. Nothing is written.
            InvalidTypeError: a method that is no str, or a percentile that is no number.
            InvalidValueError: unknown method, or one that this pass did not collect for; a percentile out of range.
        """
        _check_search(method, weight_method, percentile)
        check_lsq(self._quantizers.values(), method, weight_method)
        present = {quantizer for _, quantizer in named_quantizers(self._model)}
        if gone := [name for name, quantizer in self._quantizers.items() if quantizer not in present]:
            raise CalibrationError(f"{shortened(gone)}: no longer in the model; calibrate again")
        self._write(method, self._search(method, weight_method, percentile))
        return self

    def _search(self, method: str, weight_method: str, percentile: float) -> dict[str, DataRange]:
        """Return every range, or raise an error that names every quantizer without one."""
        for name, weight in self._weights.items():
            if weight is not None:
                self._calibrators[name] = calibrator_of(name, self._quantizers[name], weight_method)
                self._calibrators[name].collect(whole(weight.tensor))
        found: dict[str, DataRange] = {}
        problems = []
        for name, quantizer in self._quantizers.items():
            chosen = method_of(quantizer, weight_method if name in self._weights else method)
            try:
                put_on_grid(self._calibrators[name], quantizer)
                ends = self._calibrators[name].compute_range(chosen, percentile=percentile)
            except CalibrationError as error:
                problems.append(f"{name}: {error}")
                continue
            if ends is None:
                problems.append(f"{name}: was called with empty tensors only")
            else:
                found[name] = ends
        _raise_if(problems)
        return found

    def _write(self, method: str, found: dict[str, DataRange]) -> None:
        reshard(self._model)
        for name, ends in found.items():
            self._quantizers[name].replace_range(*ends)
        self.method = method
        self.ranges = tuple(self._range(name, ends) for name, ends in found.items())

    def _range(self, name: str, ends: DataRange) -> Range:
        dead = int((ends.amax if ends.amin is None else ends.amax - ends.amin).le(DEAD_AMAX).sum())
        return Range(name, ends.amax, ends.amin, self._quality(name, ends), dead)

    def _quality(self, name: str, ends: DataRange) -> float | None:
        """Return the worst channel's SQNR in dB, None where only extremes were collected."""
        calibrator, grid = self._calibrators[name], self._quantizers[name].descriptor
        if not isinstance(calibrator, HistogramCalibrator):
            return None
        if calibrator.halves is not None:
            return float(affine_sqnr_db(calibrator.halves, grid, ends).min())
        return None if calibrator.histogram is None else float(sqnr_db(calibrator.histogram, ends.amax, grid).min())

    def __str__(self) -> str:
        """Return one line a quantizer: range, SQNR, dead channels."""
        width = max((len(r.name) for r in self.ranges), default=0)
        lines = [f"{len(self.ranges)} ranges, method {self.method}, {self.num_batches} batches"]
        for r in self.ranges:
            span = f"{r.amax.min():.6g}" + (f" to {r.amax.max():.6g}" if r.amax.numel() > 1 else "")
            span += "" if r.amin is None else f", amin {r.amin.min():.6g}"
            quality = "" if r.sqnr_db is None else f"  {r.sqnr_db:.1f} dB"
            dead = f"  {r.dead_channels} dead channels" if r.dead_channels else ""
            lines.append(f"  {r.name:<{width}}  amax {span}{quality}{dead}")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    method: str = "max",
    *,
    num_batches: int | None = None,
    percentile: float = 99.99,
    weight_method: str = "max",
    forward: Forward | None = None,
    strict: bool = True,
    progress: bool = True,
    processes: Processes | None = ALL_PROCESSES,
) -> Calibration:
    """Run data through the model with quantization off and set the range of every enabled quantizer.

    The model runs in eval mode without gradient and is left in the modes it had.
    Quantizers whose descriptor fixes amax keep it. Where torch.distributed is initialized, each of its
    processes calls this with its share of the data, and all get the ranges of all the data.

    Args:
        model: quantized; the same in all processes.
        data: batches, of this process. A tensor, or the first element of an (input, target) pair, is passed to the
            model as it is; a dict as keyword arguments; anything else needs ``forward``.
        method: for activations: "max", "entropy", "percentile", "mse", "auto" (per tensor the one with the least
            quantization error), or "lsq", where training by LSQ starts; ranges that it does not train have "max".
        num_batches: how many batches this process uses at most, 1 or more; None for all.
        percentile: in percent, for the percentile method, above 1 and at most 100.
        weight_method: for weights, on the grid of each: "max", "mse", or "lsq", likewise.
        forward: runs the model on one batch, such as ``lambda model, batch: model(batch["image"])``.
        strict: a quantizer that is never called is an error; otherwise it stays uncalibrated.
        progress: show a bar, in the first process.
        processes: that calibrate together; None for this one alone.

    Returns:
        The ranges; ``apply`` computes others from the same pass (unless the method was "max",
        which collects nothing else).

    Raises:
        CalibrationError: no batches; a quantizer was never called, or saw NaN, Inf, or negative values
            on an unsigned grid; a process failed, has no data or another model, or shows no progress. All are
            named; no range is changed, in no process.
        InvalidTypeError: an argument of another type; a batch of another kind without ``forward``.
        InvalidValueError: an unknown method; nothing to calibrate; num_batches below 1; a percentile out of range.
    """
    with together(processes) as peers:
        _check_run(model, data, num_batches, forward)
        _check_search(method, weight_method, percentile)
        with every_target(model):
            quantizers = _to_calibrate(model)
            check_lsq(quantizers.values(), method, weight_method)
            owners = weights_of_quantizers(model)
            # A weight of a functional call is seen where it is used; None stands for "no module to read it from".
            weights = {name: owners.get(q) for name, q in quantizers.items() if q.is_weight or q in owners}
            # Of all, so that a method that one cannot serve is refused before any data is read.
            calibrators = {
                name: calibrator_of(name, q, weight_method if name in weights else method)
                for name, q in quantizers.items()
            }
            options = {"method": method, "weight_method": weight_method, "percentile": percentile, "strict": strict}
            peers.start(model, quantizers, options)
            met = {name: calibrator for name, calibrator in calibrators.items() if weights.get(name) is None}
            with collecting(model, met) as collectors, evaluating(model), without_sharing(model):
                done = _run(model, data, num_batches, forward or feed, progress, collectors, peers)
        every = peers.combine(done, {c.name: (c.is_called, met[c.name]) for c in collectors})
        if not every.num_batches:
            raise CalibrationError(f"data: expected at least one batch, got none; no range for {', '.join(quantizers)}")
        never = [name for name in met if name not in every.called]
        if strict:
            _raise_if([f"{name}: was never called" for name in never])
        seen = {name: q for name, q in quantizers.items() if name not in never}
        calibration = Calibration(seen, calibrators, weights, every.num_batches, model)
        found = calibration._search(method, weight_method, percentile)
        peers.finish()
        calibration._write(method, found)
    return calibration


def _check_run(model: object, data: object, num_batches: object, forward: object) -> None:
    check_module(model)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise InvalidTypeError(f"data: expected an iterable of batches, got {data!r}")
    if num_batches is not None:
        check_count("num_batches", num_batches)
    if forward is not None and not callable(forward):
        raise InvalidTypeError(f"forward: expected None or a function of model and batch, got {forward!r}")


def _check_search(method: object, weight_method: object, percentile: object) -> None:
    check_method("method", method, is_weight=False)
    check_method("weight_method", weight_method, is_weight=True)
    check_percentile(percentile)


def _to_calibrate(model: nn.Module) -> dict[str, TensorQuantizer]:
    quantizers = {name: q for name, q in named_quantizers(model) if q.is_enabled and q.is_to_calibrate}
    if not quantizers:
        raise InvalidValueError(
            "model: expected an enabled quantizer whose range comes from data, got none; dynamic and fixed ranges "
            "need no calibration"
        )
    return quantizers


def _run(
    model: nn.Module,
    data: Iterable[Any],
    num_batches: int | None,
    forward: Forward,
    progress: bool,
    collectors: Iterable[Collector],
    peers: Alone,
) -> int:
    total = len(data) if isinstance(data, Sized) else None
    if num_batches is not None:
        total = num_batches if total is None else min(total, num_batches)
    done = 0
    with tqdm(total=total, desc="calibrate", unit="batch", disable=not (progress and peers.is_first)) as bar:
        for batch in peers.batches(itertools.islice(data, num_batches)):
            forward(model, batch)
            for collector in collectors:
                collector.forget()
            done += 1
            bar.update()
    return done


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise CalibrationError(f"{len(problems)} quantizers have no range:\n  " + "\n  ".join(problems))
