"""Calibration by 2 processes against 1 over the same batches, and what they send each other.

Each process has one thread: what a device of its own is elsewhere.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from networks import network
from timing import print_ratios
from torch import distributed

import fakequant as fq

_BATCHES, _BATCH = 32, 16
_NETWORK_COUNTERS = Path("/proc/net/dev")


def main() -> None:
    """ResNet-18, 64x64, 32 batches of 16, entropy."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_process, args=(rank, store.port)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = network("resnet18").eval()
    fq.quantize(model)
    data = [torch.randn(_BATCH, 3, 64, 64) for _ in range(_BATCHES)]

    def together() -> None:
        fq.calibrate(model, data[rank::2], "entropy", progress=False)

    if rank == 0:
        _measure(model, data, together)
        _tell(False)
    else:
        while _tell(None):
            together()
    distributed.destroy_process_group()


def _measure(model: torch.nn.Module, data: list[torch.Tensor], together: Callable[[], None]) -> None:
    def alone(threads: int) -> None:
        torch.set_num_threads(threads)
        fq.calibrate(model, data, "entropy", progress=False, processes=None)
        torch.set_num_threads(1)

    def both() -> None:
        _tell(True)
        together()

    print_ratios(
        f"distributed calibration, ResNet-18 64x64, {_BATCHES} batches of {_BATCH}; 1.0 is 1 process with 1 thread",
        {
            "1 process, 1 thread": lambda: alone(1),
            "2 processes, 1 thread each": both,
            "1 process, 2 threads": lambda: alone(2),
        },
        rounds=5,
    )
    if _NETWORK_COUNTERS.exists():
        quantizers = sum(q.is_enabled and not q.is_weight for _, q in fq.nn.walk.named_quantizers(model))
        sent = min(_sent_by(both) for _ in range(5)) / 2 / quantizers
        print(f"  sent by each of 2 processes, on the loopback interface: {sent / 1024:.1f} KiB a quantizer")


def _tell(message: bool | None) -> bool | None:
    """Send a message from process 0 to process 1, which returns it."""
    messages = [message]
    distributed.broadcast_object_list(messages, src=0)
    return messages[0]


def _sent_by(work: Callable[[], None]) -> int:
    before = _loopback_bytes()
    work()
    return _loopback_bytes() - before


def _loopback_bytes() -> int:
    (line,) = (line for line in _NETWORK_COUNTERS.read_text().splitlines() if line.split(":")[0].strip() == "lo")
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    main()
