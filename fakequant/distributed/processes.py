"""Processes: which ones calibrate together."""

import dataclasses
from typing import TYPE_CHECKING, Optional

from torch import distributed

from fakequant.arguments import check_number
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_LONGEST = 1e9
"""Seconds: torch counts time limits in nanoseconds, in int64."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that calibrate together.

    Args:
        group: of torch.distributed; None for its default group, and for this process alone where there is none.
        time_limit: seconds in which a process must show progress, such as a batch that is done. One that does not
            is given up, and every other process raises; a slow one that goes on is waited for.

    Raises:
        InvalidTypeError: a group or a time limit of another type.
        InvalidValueError: a time limit that is not positive, or longer than 30 years.
    """

    group: Optional["ProcessGroup"] = None
    time_limit: float = 600.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.group is not None and not _is_group(self.group):
            raise InvalidTypeError(f"group: expected None or a ProcessGroup, got {self.group!r}")
        check_number("time_limit", self.time_limit, above=0, at_most=_LONGEST)

    def several(self) -> Optional["ProcessGroup"]:
        """Return their group if this process is not the only one, else None.

        Raises:
            InvalidValueError: this process is not in the group.
            CalibrationError: torch was built without gloo.
        """
        group = group_in_use(self.group)
        if group is None:
            return None
        if distributed.get_world_size(group) == 1:
            return None
        if not distributed.is_gloo_available():
            raise CalibrationError("torch: expected a build with gloo, over which statistics are summed, got none")
        return group


def _is_group(group: object) -> bool:
    """Whether it is what torch.distributed.new_group returns, in a process that is not in it too."""
    if not distributed.is_available():
        return False
    return isinstance(group, distributed.ProcessGroup) or group is distributed.GroupMember.NON_GROUP_MEMBER


def group_in_use(group: Optional["ProcessGroup"]) -> Optional["ProcessGroup"]:
    """Return a group, for None the default one; None if torch.distributed does not run.

    Raises:
        InvalidValueError: this process is not in the group.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = group or distributed.group.WORLD
    if distributed.get_rank(group) < 0:
        raise InvalidValueError(
            f"group: expected one that has this process, {distributed.get_rank()}, got one of "
            f"{distributed.get_process_group_ranks(group)}"
        )
    return group
