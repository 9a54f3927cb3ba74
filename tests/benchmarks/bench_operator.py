"""The fake-quantize operator, forward and backward, against torch's own on a 25 MB tensor."""

import torch
from timing import print_ratios
from torch import Tensor

from fakequant.fake_quantize import fake_quantize


def main() -> None:
    """Times are torch's divided by ours when read as 1 / ratio."""
    x = torch.randn(64, 100470, requires_grad=True)
    upstream = torch.randn_like(x)
    compiled = torch.compile(fake_quantize, fullgraph=True)
    channels = torch.rand(64) / 30 + 0.02
    zero = torch.zeros(64, dtype=torch.int32)

    def both(output: Tensor) -> None:
        output.backward(upstream)
        x.grad = None

    def torch_tensor() -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127)

    def torch_channel() -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, channels, zero, 0, -128, 127)

    scale = torch.tensor(0.03)
    rows = channels[:, None]
    for title, reference, step in (("per tensor", torch_tensor, scale), ("per channel", torch_channel, rows)):
        ratios = print_ratios(
            f"operator, {title}, forward + backward, 25.7 MB float32",
            {
                "torch.fake_quantize": lambda reference=reference: both(reference()),
                "fakequant, eager": lambda step=step: both(fake_quantize(x, step, -128, 127)),
                "fakequant, torch.compile": lambda step=step: both(compiled(x, step, -128, 127)),
            },
            rounds=31,
        )
        print("  times as fast: " + ", ".join(f"{name} {1 / ratio:.1f}" for name, ratio in list(ratios.items())[1:]))


if __name__ == "__main__":
    main()
