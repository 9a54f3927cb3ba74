"""Peak resident memory of calibration against the float forward, each in a process of its own."""

import resource
import subprocess
import sys

import torch
from networks import network

import fakequant as fq


def _measure(what: str, batches: int) -> None:
    torch.set_num_threads(2)
    model = network("resnet50").eval()
    data = (torch.randn(8, 3, 224, 224) for _ in range(batches))
    if what == "forward":
        with torch.no_grad():
            for batch in data:
                model(batch)
    else:
        fq.quantize(model)
        calibration = fq.calibrate(model, data, "entropy", progress=False)
        for method in ("max", "percentile", "mse"):
            calibration.apply(method)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """ResNet-50, 224x224, batch 8, all four methods, after 4 and after 400 batches (400 take minutes)."""
    if len(sys.argv) == 3:
        _measure(sys.argv[1], int(sys.argv[2]))
        return
    print("\npeak memory, ResNet-50 224x224 batch 8, all four methods; 1.0 is the float forward over 4 batches")
    peaks = {}
    for what, batches in (("forward", 4), ("calibrate", 4), ("calibrate", 400)):
        run = subprocess.run([sys.executable, __file__, what, str(batches)], capture_output=True, text=True, check=True)
        peaks[what, batches] = int(run.stdout)
        ratio = peaks[what, batches] / peaks["forward", 4]
        print(f"  {what:<10} {batches:>4} batches   {ratio:6.3f}   {peaks[what, batches] / 1024:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
