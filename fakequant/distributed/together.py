"""One calibration, by one process or by several: where they agree before, during and after the data.

Processes fail together: whatever goes wrong in one, each raises, and none changes a range.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import distributed, nn

from fakequant.calib import Calibrator
from fakequant.calib.additive import AdditiveCalibrator
from fakequant.distributed.description import description, digest, raise_difference
from fakequant.distributed.model_runs import needs_equal_steps, share_buffers
from fakequant.distributed.peers import Peers, stopped
from fakequant.distributed.processes import Processes
from fakequant.distributed.summing import Shape, merge_all
from fakequant.errors import CalibrationError, FakeQuantError, InvalidTypeError
from fakequant.nn import TensorQuantizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_END = object()

Collected: TypeAlias = tuple[bool, Calibrator]
"""Of one quantizer: whether it was called, and its calibrator."""


class Collection(NamedTuple):
    """What all processes did.

    Attributes:
        num_batches: of all processes.
        called: names of the quantizers that any process called.
    """

    num_batches: int
    called: frozenset[str]


class Alone:
    """A process that calibrates alone: it has to agree with nobody."""

    is_first = True
    """Whether this process speaks for all, on the screen."""

    def start(self, model: nn.Module, quantizers: Mapping[str, TensorQuantizer], options: Mapping[str, Any]) -> None:
        """Check that all calibrate the same."""

    def batches(self, data: Iterable[Any]) -> Iterable[Any]:
        """Return the batches, of which each begins only while all processes are well."""
        return data

    def combine(self, num_batches: int, collected: Mapping[str, Collected]) -> Collection:
        """Give each calibrator the data of all processes."""
        return Collection(num_batches, frozenset(name for name, (is_called, _) in collected.items() if is_called))

    def finish(self) -> None:
        """Wait until all processes have their ranges and can write them."""


class Together(Alone):
    """A process that calibrates together with others.

    Args:
        group: theirs.
        time_limit: see ``Processes``.
    """

    def __init__(self, group: "ProcessGroup", time_limit: float) -> None:
        ranks, rank = distributed.get_process_group_ranks(group), distributed.get_rank()
        self.peers = Peers(group.get_group_store(), ranks, rank, time_limit)
        self.is_first = self.peers.rank == self.peers.ranks[0]
        self._group = group
        self._in_step = False
        self._sums: ProcessGroup | None = None

    def start(self, model: nn.Module, quantizers: Mapping[str, TensorQuantizer], options: Mapping[str, Any]) -> None:
        """Raise CalibrationError, in all processes, if one calibrates another model or in another way."""
        own = description(model, quantizers, options)
        if len(set(self.peers.exchange("digest", digest(own)))) > 1:
            raise_difference(self.peers.ranks, self.peers.exchange("description", own))
        share_buffers(model, self._group)
        self._in_step = needs_equal_steps(model)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; raise CalibrationError if another process failed, or has fewer for a sharded model."""
        source = iter(data)
        for number in itertools.count():
            self.peers.go_on()
            batch = next(source, _END)
            if self._in_step:
                self._check_step(number, batch is not _END)
            if batch is _END:
                return
            yield batch
            del batch  # before the next one is made

    def combine(self, num_batches: int, collected: Mapping[str, Collected]) -> Collection:
        """Give each calibrator the data of all processes; raises CalibrationError if one has none."""
        calibrators = [calibrator for _, calibrator in collected.values()]
        report = {
            "batches": num_batches,
            "called": [is_called for is_called, _ in collected.values()],
            "shapes": [c.shape if isinstance(c, AdditiveCalibrator) else None for c in calibrators],
        }
        reports = self.peers.exchange("collected", report)
        found, shapes = combined(self.peers.ranks, list(collected), reports)
        try:
            self._sums = self.peers.connect()  # open until all are done: ``finish``
            merge_all(self._sums, list(zip(calibrators, shapes, strict=True)))
        except RuntimeError as error:  # gloo's: a process ended meanwhile
            if isinstance(error, FakeQuantError):
                raise
            self.peers.exchange("ranges", False)  # names it
            raise CalibrationError(f"the statistics of the processes could not be summed: {error}") from error
        return found

    def finish(self) -> None:
        """Wait for all; raises CalibrationError if one has no ranges."""
        well = self.peers.exchange("ranges", True)
        if not all(well):
            without = [rank for rank, is_well in zip(self.peers.ranks, well, strict=True) if not is_well]
            raise stopped(dict.fromkeys(without, "could not sum the statistics"))

    def _check_step(self, number: int, has_batch: bool) -> None:
        have = self.peers.exchange(f"batch {number}", has_batch)
        if any(have) and not all(have):
            ended = [str(rank) for rank, has in zip(self.peers.ranks, have, strict=True) if not has]
            raise CalibrationError(
                f"data: expected as many batches in each process, because the model is sharded; process "
                f"{', '.join(ended)} has {number}, another one more"
            )


def combined(
    ranks: Sequence[int], names: Sequence[str], reports: Sequence[Mapping[str, Any]]
) -> tuple[Collection, list[Shape]]:
    """Return what all processes did, and the shape of each range, from what each process reports.

    Raises:
        CalibrationError: a process without data; ranges of different shapes. All are named.
    """
    problems = [
        f"process {rank}: data: expected at least one batch, got none"
        for rank, report in zip(ranks, reports, strict=True)
        if not report["batches"]
    ]
    shapes: list[Shape] = []
    for i, name in enumerate(names):
        reported = [(rank, report["shapes"][i]) for rank, report in zip(ranks, reports, strict=True)]
        seen = {rank: tuple(shape) for rank, shape in reported if shape is not None}
        if len(set(seen.values())) > 1:
            each = ", ".join(f"{shape} in process {rank}" for rank, shape in seen.items())
            problems.append(f"{name}: amax shape: expected the same in all processes, got {each}")
        shapes.append(next(iter(seen.values()), None))
    if problems:
        raise CalibrationError("no range was changed:\n  " + "\n  ".join(problems))
    called = frozenset(name for i, name in enumerate(names) if any(report["called"][i] for report in reports))
    return Collection(sum(report["batches"] for report in reports), called), shapes


@contextlib.contextmanager
def together(processes: Processes | None) -> Iterator[Alone]:
    """Calibrate with other processes for a with block; what one raises there, the others hear of.

    Raises:
        InvalidTypeError: no Processes.
    """
    if processes is not None and not isinstance(processes, Processes):
        raise InvalidTypeError(f"processes: expected Processes or None, got {processes!r}")
    group = processes.several() if processes is not None else None
    if processes is None or group is None:
        yield Alone()
        return
    mine = Together(group, processes.time_limit)
    try:
        yield mine
    except BaseException as error:
        failures = mine.peers.leave(f"{type(error).__name__}: {error}")
        if failures and isinstance(error, RuntimeError) and not isinstance(error, FakeQuantError):
            raise stopped(failures) from error  # of a collective in the model, because another process left
        raise
