"""Processes: which ones calibrate together."""

import dataclasses
import math
from typing import TYPE_CHECKING, Optional

from torch import distributed

from fakequant.errors import CalibrationError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that calibrate together.

    Args:
        group: of torch.distributed; None for its default group, and for this process alone where there is none.
        time_limit: seconds in which a process must show progress, such as a batch that is done. One that does not
            is given up, and every other process raises; a slow one that goes on is waited for.

    Raises:
        InvalidValueError: a time limit that is not positive.
    """

    group: Optional["ProcessGroup"] = None
    time_limit: float = 600.0

    def __post_init__(self) -> None:
        """Check the time limit."""
        if not 0 < self.time_limit < math.inf:
            raise InvalidValueError(f"time_limit: expected a positive number of seconds, got {self.time_limit}")

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
