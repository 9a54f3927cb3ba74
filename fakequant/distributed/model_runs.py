"""Models whose own forward has collectives: DistributedDataParallel, FSDP2, sharded parameters."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fakequant.nn import TensorQuantizer
from fakequant.nn.sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def needs_equal_steps(model: nn.Module) -> bool:
    """Whether a forward of one process waits for a forward of each other one."""
    # Here, because the import takes more than a second.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()) or any(
        is_sharded(parameter) for parameter in model.parameters()
    )


def shares_buffers(model: nn.Module) -> bool:
    """Whether the forward of each replica begins with the buffers of the first process."""
    return bool(_replicas(model))


def share_buffers(model: nn.Module, group: "ProcessGroup") -> None:
    """Give the replicas of DistributedDataParallel the buffers of the first process, as their forward would."""
    source = distributed.get_global_rank(group, 0)
    for replica in _replicas(model):
        for module in replica.modules():
            if not isinstance(module, TensorQuantizer):
                for buffer in module.buffers(recurse=False):
                    distributed.broadcast(buffer, source, group=group)


@contextlib.contextmanager
def without_sharing(model: nn.Module) -> Iterator[None]:
    """Let the replicas of DistributedDataParallel run for a with block without waiting for each other."""
    replicas = _replicas(model)
    for replica in replicas:
        replica.require_forward_param_sync = False
    try:
        yield
    finally:
        for replica in replicas:
            replica.require_forward_param_sync = True


def _replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """Return those whose forward broadcasts buffers."""
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel) and m.forward_sync_buffers]
