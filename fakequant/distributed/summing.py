"""The statistics of all processes, combined in place.

Two all-reduces whatever the number of quantizers: the largest values, then the sums, whose bins they
align; and two all-gathers for calibrators of a user's own, which only know how to ``merge``.
"""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from fakequant.calib import Calibrator
from fakequant.calib.additive import AdditiveCalibrator, is_additive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Shape = tuple[int, ...] | None


def merge_all(group: "ProcessGroup", calibrators: Sequence[tuple[Calibrator, Shape]]) -> None:
    """Give every calibrator what those of all processes collected.

    Args:
        group: of all processes.
        calibrators: with the shape of each one's range, None where no process has data: in the same order in all.
    """
    _add_up(group, [(c, shape) for c, shape in calibrators if is_additive(c) and shape is not None])
    _merge(group, [calibrator for calibrator, _ in calibrators if not is_additive(calibrator)])


def _add_up(group: "ProcessGroup", calibrators: list[tuple[AdditiveCalibrator, tuple[int, ...]]]) -> None:
    if not calibrators:
        return
    maxima = _reduced(group, [c.maxima(shape) for c, shape in calibrators], distributed.ReduceOp.MAX)
    own = [c.sums(shape, largest) for (c, shape), largest in zip(calibrators, maxima, strict=True)]
    sums = _reduced(group, own, distributed.ReduceOp.SUM)
    for (calibrator, shape), largest, summed in zip(calibrators, maxima, sums, strict=True):
        calibrator.load(shape, largest, summed)


def _reduced(group: "ProcessGroup", parts: list[Tensor], operation: distributed.ReduceOp.RedOpType) -> list[Tensor]:
    """Return the parts combined over all processes, in one collective."""
    flat = torch.cat(parts)
    group.allreduce([flat], op=operation).wait()
    return list(flat.split([len(part) for part in parts]))


def _merge(group: "ProcessGroup", calibrators: list[Calibrator]) -> None:
    if not calibrators:
        return
    buffer = io.BytesIO()
    torch.save(calibrators, buffer)
    for calibrator in calibrators:
        calibrator.reset()
    for data in _gathered(group, torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)):
        # Pickled, but by a process of the same job, which runs the same code.
        others = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=False)
        for calibrator, other in zip(calibrators, others, strict=True):
            calibrator.merge(other)


def _gathered(group: "ProcessGroup", own: Tensor) -> Iterator[Tensor]:
    """Yield a flat tensor of each process, which may have different lengths."""
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather([sizes], [torch.tensor([len(own)])]).wait()
    longest = max(int(size) for size in sizes)
    parts = [own.new_empty(longest) for _ in sizes]
    group.allgather([parts], [torch.cat([own, own.new_zeros(longest - len(own))])]).wait()
    return (part[: int(size)] for part, size in zip(parts, sizes, strict=True))
