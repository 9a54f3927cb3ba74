"""Calibration against the plain forward passes over the same 8 batches."""

import torch
from networks import network
from timing import print_ratios

import fakequant as fq


def main() -> None:
    """ResNet-18, 64x64, batch 16, 8 batches."""
    float_model = network("resnet18").eval()
    data = [torch.randn(16, 3, 64, 64) for _ in range(8)]
    model = network("resnet18").eval()
    fq.quantize(model)

    @torch.no_grad()
    def forward() -> None:
        for batch in data:
            float_model(batch)

    def all_four() -> None:
        calibration = fq.calibrate(model, data, "entropy", progress=False)
        for method in ("max", "percentile", "mse"):
            calibration.apply(method)

    print_ratios(
        "calibration, ResNet-18 64x64, 8 batches of 16; 1.0 is the float forward",
        {
            "float forward": forward,
            "max": lambda: fq.calibrate(model, data, "max", progress=False),
            "histogram collection, percentile": lambda: fq.calibrate(model, data, "percentile", progress=False),
            "histogram collection, entropy": lambda: fq.calibrate(model, data, "entropy", progress=False),
            "histogram collection, mse": lambda: fq.calibrate(model, data, "mse", progress=False),
            "all four methods": all_four,
        },
    )


if __name__ == "__main__":
    main()
