"""The fake-quantize operators on a 25 MB tensor: that of fixed ranges against torch's own, learned ones against it."""

from collections.abc import Callable

import torch
from timing import print_ratios
from torch import Tensor

from fakequant.fake_quantize import fake_quantize
from fakequant.fake_quantize.learned import lsq, lsq_plus, pact


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
    _learned(x, scale * 127, both)


def _learned(x: Tensor, amax: Tensor, both: Callable[[Tensor], None]) -> None:
    """Compare what trains a range per tensor with what keeps it."""
    amax, amin = (bound.clone().requires_grad_() for bound in (amax, -amax))
    print_ratios(
        "operator with learned ranges, per tensor, forward + backward, 25.7 MB float32",
        {
            "fixed": lambda: both(fake_quantize(x, amax.detach() / 127, -128, 127)),
            "LSQ": lambda: both(lsq(x, amax, -128, 127, x.shape[1])),
            "LSQ+": lambda: both(lsq_plus(x, amin, amax, 0, 255, x.shape[1])),
            "PACT": lambda: both(pact(x, amax, -128, 127)),
        },
        rounds=31,
    )


if __name__ == "__main__":
    main()
