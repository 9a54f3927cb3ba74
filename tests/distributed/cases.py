"""``python cases.py FOLDER``: 4 processes, started once, run every case; each leaves FOLDER/<case>.<rank>.pt.

First the same work is done by one process, outside of torch.distributed: FOLDER/<case>.alone.pt.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.fsdp
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from fakequant.calib import HistogramCalibrator, MaxCalibrator, register_calibrator
from fakequant.calibration import Calibration, calibrate
from fakequant.descriptor import QuantDescriptor
from fakequant.distributed import Processes
from fakequant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from fakequant.nn.walk import named_quantizers

ALL = (0, 1, 2, 3)
LIMIT = 2.0


@register_calibrator("mean_amax")
class MeanAmax(MaxCalibrator):
    """A calibrator of a user's: the mean over tensors of their largest magnitude, kept as whole numbers."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.total = self.tensors = 0

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        self.total += int(x.abs().max() * 1000)
        self.tensors += 1

    def merge(self, other: "MeanAmax") -> None:
        super().merge(other)
        self.total += other.total
        self.tensors += other.tensors

    def reset(self) -> None:
        super().reset()
        self.total = self.tensors = 0

    def compute_range(self, method=None, *, percentile=99.99):
        found = super().compute_range(method)
        return found and found._replace(amax=torch.tensor(self.total / 1000 / self.tensors))


class Net(nn.Module):
    """Convolution, batch norm and linear layer; ``sometimes`` sees only batches of 3."""

    def __init__(self, num_bits: int = 8, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = QuantConv2d(2, 6, 3, quant_desc_input=QuantDescriptor(num_bits))
        self.norm = nn.BatchNorm2d(6)
        self.sometimes = TensorQuantizer()
        self.fc = QuantLinear(6, 4)
        if extra:
            self.extra = QuantLinear(4, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.sometimes(x) if len(x) == 3 else x)


class Grids(nn.Module):
    """One quantizer a grid, all on the same tensor."""

    def __init__(self, **grids: QuantDescriptor) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict({name: TensorQuantizer(grid) for name, grid in grids.items()})

    def forward(self, x: Tensor) -> Tensor:
        for quantizer in self.quantizers.values():
            quantizer(x)
        return x


def symmetric() -> Grids:
    return Grids(tensor=QuantDescriptor(), channel=QuantDescriptor(axis=1), four=QuantDescriptor(4, axis=(0, 2)))


def affine() -> Grids:
    return Grids(
        tensor=QuantDescriptor(affine=True),
        channel=QuantDescriptor(affine=True, axis=1),
        unsigned=QuantDescriptor(affine=True, unsigned=True),
    )


def extremes() -> Grids:
    own = QuantDescriptor(calib_method="mean_amax")
    return Grids(block=QuantDescriptor(4, block_size=4), affine=QuantDescriptor(affine=True, axis=1), own=own)


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3 if i == 5 else 2, 2, 6, 6) * (1 + i) for i in range(8)]


def tensors() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(2, 6, 8, 8) ** 3 * 3.0 ** (i % 5) for i in range(9)]


EQUAL: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], str, str]] = {
    "net-entropy": (Net, images, "entropy", "mse"),
    "net-max": (Net, images, "max", "max"),
    "symmetric-entropy": (symmetric, tensors, "entropy", "percentile"),
    "affine-percentile": (affine, tensors, "percentile", "max"),
    "extremes-max": (extremes, tensors, "max", "max"),
}
"""{case: model, batches, method, another method of the same pass}."""


def share(batches: list[Tensor], place: int, size: int) -> list[Tensor]:
    """Return unequal shares: the last process has the most."""
    last = len(batches) - size + 1
    return batches[place : place + 1] if place < size - 1 else batches[-last:]


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """Return both ends of every range, by name."""
    found = {}
    for name, quantizer in named_quantizers(model):
        for suffix, end in zip(("", ".amin"), quantizer.ends, strict=True):
            if end is not None:
                found[name.removeprefix("module.") + suffix] = end.clone()
    return found


def run(model: nn.Module, data, method: str = "entropy", other: str | None = None, **options) -> dict:
    """Calibrate, and say all that a test may want to know of it."""
    before, start = ranges(model), time.monotonic()
    found: dict = {"error": "", "text": ""}
    try:
        calibration = calibrate(model, data, method, **{"progress": False, **options})
        found["text"] = str(calibration)
        found["ranges"] = ranges(model)
        found["batches"] = calibration.num_batches
        if other is not None:
            calibration.apply(other)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - start
    found["after"] = ranges(model)
    found["changed"] = before.keys() != found["after"].keys()
    return found


# What goes wrong: each gives (model, data, method) of this process.


def bad_loader() -> Iterator[Tensor]:
    yield images()[0]
    raise OSError("disk is gone")


class Failing(Net):
    """Does something else in the second forward."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        if self.number == 2:
            self.act()
        return super().forward(x)


def fail() -> None:
    raise ValueError("bad sample")


def other_weights() -> Net:
    model = Net()
    with torch.no_grad():
        model.fc.weight[0, 0] += 1e-4
    return model


WRONG: dict[str, tuple[int, Callable[[], tuple]]] = {
    "no-data": (1, lambda: (Net(), [])),
    "forward-raises": (2, lambda: (Failing(fail), images())),
    "loader-raises": (0, lambda: (Net(), bad_loader())),
    "argument": (3, lambda: (Net(), images(), "entropy", {"num_batches": -1})),
    "silent": (3, lambda: (Failing(lambda: time.sleep(2 * LIMIT)), images())),
    "other-names": (1, lambda: (Net(extra=True), images())),
    "other-grid": (1, lambda: (Net(num_bits=4), images())),
    "other-weights": (2, lambda: (other_weights(), images())),
    "other-method": (3, lambda: (Net(), images(), "mse")),
    "nan": (2, lambda: (Net(), [*images(), torch.full((2, 2, 6, 6), torch.nan)])),
    "killed": (3, lambda: (Failing(lambda: os.kill(os.getpid(), 9)), images())),
}
"""{case: the process that is wrong, what it does}; the others calibrate Net. "killed" is the last that 3 sees."""


def equal_cases(rank: int, groups: dict[int, object]) -> Iterator[tuple[str, dict]]:
    for case, (make, batches, method, other) in EQUAL.items():
        for size, group in groups.items():
            if rank < size:
                found = run(make(), share(batches(), rank, size), method, other, processes=Processes(group))
                yield f"{case}-{size}", found
    yield "alone", run(Net(), images()[rank:], processes=None)
    replicas = DistributedDataParallel(Net())
    replicas.module.norm.running_mean += rank  # training leaves them so
    replicas.require_forward_param_sync = False  # as after a forward without gradient
    yield "ddp", run(replicas, share(images(), rank, 4))
    yield "ddp-module", run(DistributedDataParallel(Net()).module, share(images(), rank, 4))
    if rank == 0:  # the others would have to broadcast too
        yield "ddp-alone", run(replicas, images(), processes=None)


def sharded() -> nn.Module:
    model = Net()
    mesh = DeviceMesh("cpu", list(ALL))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)


def wrong_cases(rank: int) -> Iterator[tuple[str, dict]]:
    yield "fsdp", run(sharded(), images()[2 * rank : 2 * rank + 2])
    yield "fsdp-unequal", run(sharded(), images()[: 1 if rank == 1 else 2])
    if rank == 0:
        yield "came-alone", run(Net(), images(), processes=Processes(time_limit=LIMIT))
    distributed.barrier()
    yield "met", run(Net(), share(images(), rank, 4))
    yield "met-again", run(Net(), share(images(), rank, 4))
    for case, (who, act) in WRONG.items():
        model, data, *rest = act() if rank == who else (Net(), images()[:3])
        method, options = (*rest, *("entropy", {})[len(rest) :])
        limit = LIMIT if case in ("silent", "killed") else 60.0
        yield case, run(model, data, method, processes=Processes(time_limit=limit), **options)


def die(*_args: object, **_options: object) -> None:
    os._exit(5)


def process(rank: int, port: int, folder: Path) -> None:
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    groups = {size: distributed.new_group(list(range(size))) for size in (1, 2, 3)} | {4: None}
    absent = distributed.new_group([1, 3])
    three, two = distributed.new_group([0, 1, 2]), distributed.new_group([0, 1])

    def cases() -> Iterator[tuple[str, dict]]:
        yield from equal_cases(rank, groups)
        shapes = Grids(channel=QuantDescriptor(axis=1))
        yield "other-shapes", run(shapes, [torch.ones(2, 5 if rank == 1 else 6)])
        if rank == 1:
            yield "absent", run(Net(), images(), processes=Processes(absent, LIMIT))
        yield from wrong_cases(rank)
        if rank == 2:
            HistogramCalibrator.sums = die
        yield "dies-summing", run(Net(), images()[:3], processes=Processes(three, LIMIT))
        if rank == 1:
            Calibration._search = die
        yield "dies-searching", run(Net(), images(), processes=Processes(two, LIMIT))

    for case, found in cases():
        torch.save(found, folder / f"{case}.{rank}.pt")
    os._exit(0)  # torch would wait for the dead


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case, (make, batches, method, other) in EQUAL.items():
        torch.save(run(make(), batches(), method, other), folder / f"{case}.alone.pt")
    for rank in ALL:
        torch.save(run(Net(), images()[rank:]), folder / f"alone-{rank}.alone.pt")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")  # after the imports: they are half of the time
    children = [context.Process(target=process, args=(rank, store.port, folder)) for rank in ALL]
    for child in children:
        child.start()
    for child in children:
        child.join()
    codes = [child.exitcode for child in children]
    assert codes == [0, 5, 5, -9], codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
