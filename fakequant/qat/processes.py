"""Ranges in several processes of torch.distributed.

DistributedDataParallel broadcasts the values of ranges, but not their shapes. A range that is not known has no
elements. If one process calibrated and another did not, it lets them differ in silence, or crashes: the two send
and expect different sizes. What all processes have is gathered here first, so that all raise where they differ.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional, TypeAlias

import torch
from torch import Tensor, distributed, nn

from fakequant.distributed.processes import group_in_use
from fakequant.errors import InvalidValueError
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import check_is_quantized, named_quantizers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Range(NamedTuple):
    grid: str
    amax: Tensor | None
    amin: Tensor | None


_Ranges: TypeAlias = dict[str, _Range]


def broadcast_ranges(model: nn.Module, group: Optional["ProcessGroup"] = None) -> None:
    """Give every process the ranges of the first one, known or not; all of them call it.

    Call it before DistributedDataParallel or ``fully_shard`` if the processes do not all calibrate or load ranges.
    Without torch.distributed it changes nothing.

    Args:
        model: quantized in the same way in each process.
        group: of torch.distributed; None for all processes.

    Raises:
        InvalidValueError: another process has other quantizers or grids; then all raise, and no range is changed.
            This process is not in the group. A model without quantizers.
    """
    check_is_quantized(model)
    quantizers = dict(named_quantizers(model))
    first = _ranges_of_all(quantizers, group)[0]
    for name, quantizer in quantizers.items():
        _, amax, amin = first[name]
        if amax is None:
            quantizer.amax = None
        else:
            quantizer.replace_range(amax, amin)


def average_ranges(model: nn.Module, group: Optional["ProcessGroup"] = None) -> None:
    """Give each range that follows the data the mean of what it is in all processes.

    All processes call this at the same step, such as by ``Phases``. Without torch.distributed it changes nothing.

    Args:
        model: whose ranges follow.
        group: of torch.distributed; None for all processes.

    Raises:
        InvalidValueError: no range follows, other ones follow in another process, one is still unknown, or of
            another grid or shape there; all raise, with its name, and no range is changed. This process is not in
            the group.
    """
    following = {name: q for name, q in named_quantizers(model) if q.momentum is not None and not q.stands_by}
    of_all = _ranges_of_all(following, group)
    unknown = [
        f"{name} in process {rank}"
        for rank, ranges in enumerate(of_all)
        for name, known in ranges.items()
        if known.amax is None
    ]
    if unknown or not following:
        found = f"none for {', '.join(unknown)}" if unknown else "none that follow"
        raise InvalidValueError(f"model: expected known ranges that follow the data, got {found}")
    means = {name: _mean(name, [ranges[name] for ranges in of_all]) for name in following}
    for name, quantizer in following.items():
        quantizer.set_range(*means[name])


def _ranges_of_all(quantizers: Mapping[str, TensorQuantizer], group: Optional["ProcessGroup"]) -> list[_Ranges]:
    """Return the ranges of quantizers in each process; raise in all of them if they have not the same ones."""
    group = group_in_use(group)
    mine: _Ranges = {
        name: _Range(quantizer.descriptor.to_json(), *(None if end is None else end.cpu() for end in quantizer.ends))
        for name, quantizer in quantizers.items()
    }
    if group is None:
        return [mine]
    of_all: list[_Ranges] = [mine] * distributed.get_world_size(group)
    distributed.all_gather_object(of_all, mine, group)
    first = of_all[0]
    for rank, other in enumerate(of_all):
        if differing := sorted(first.keys() ^ other.keys()):
            here, there = (0, rank) if differing[0] in first else (rank, 0)
            raise InvalidValueError(
                f"{differing[0]}: expected the same quantizers in all processes, got it in {here}, not in {there}"
            )
        for name, (grid, _, _) in other.items():
            if grid != first[name].grid:
                raise InvalidValueError(
                    f"{name}: expected the same grid in all processes, got {first[name].grid} in 0, {grid} in {rank}"
                )
    return of_all


def _mean(name: str, ranges: Sequence[_Range]) -> tuple[Tensor, Tensor | None]:
    amax = [known.amax for known in ranges if known.amax is not None]
    amin = [known.amin for known in ranges if known.amin is not None]
    if len({end.shape for end in amax}) > 1:
        raise InvalidValueError(
            f"{name}: expected a range of the same shape in all processes, got {[tuple(end.shape) for end in amax]}"
        )
    return torch.stack(amax).mean(0), torch.stack(amin).mean(0) if amin else None
