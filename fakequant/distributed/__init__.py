"""Calibration by several processes of torch.distributed, each with its share of the data.

===========  =========================================================================
processes    Processes: which ones, and how long one may be silent
peers        messages between them, in torch's store: nobody waits for ever
description  what must be the same in all of them
summing      their statistics, combined in a few collectives
model_runs   models whose own forward has collectives: DDP, FSDP2
together     one calibration, step by step
===========  =========================================================================
"""

from fakequant.distributed.model_runs import without_sharing
from fakequant.distributed.processes import Processes
from fakequant.distributed.together import Alone, together

__all__ = ["Alone", "Processes", "together", "without_sharing"]
