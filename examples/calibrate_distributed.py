"""Calibration by several processes, each with its share of the images: all get the ranges of all images.

    torchrun --nproc-per-node 2 examples/calibrate_distributed.py ranges.safetensors

On GPUs, one process a GPU. Replace ``float_model`` and ``images`` by your own.
"""

import os
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Subset

import fakequant as fq


def float_model() -> nn.Module:
    torch.manual_seed(0)  # the same weights in each process
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10))


def images() -> Tensor:
    return torch.randn(101, 3, 14, 14, generator=torch.Generator().manual_seed(1))


def share(rank: int, world_size: int) -> Iterable[Tensor]:
    """Return the batches of one process. DistributedSampler would repeat images until all shares are equal."""
    everything = images()
    return DataLoader(Subset(everything, range(rank, len(everything), world_size)), batch_size=16)


def main(path: str) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    model = float_model().to(device)
    fq.quantize(model)
    calibration = fq.calibrate(
        model, share(rank, world_size), method="entropy", forward=lambda model, batch: model(batch.to(device))
    )
    if rank == 0:  # every process has the same
        print(calibration)
        fq.save_amax(model, path)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
