"""What it costs to plan, and to intercept functional ops: the same model without call sites is 1.0."""

import copy
import sys
import time

import torch
from networks import network
from timing import print_ratios
from torch import nn

import fakequant as fq
from fakequant.call_sites import call_sites, release


class _Passing(nn.Identity):
    """Stands for a quantizer that costs nothing: what is left is the interception."""

    is_active = True


def _with_and_without_sites(name: str, images: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    model = network(name).eval()
    fq.quantize(model, example_inputs=images)
    fq.calibrate(model, [images], "max", progress=False)
    without = copy.deepcopy(model)
    for module in without.modules():
        release(module)
    for _, site in call_sites(model):
        for operand in list(site._modules):
            site._modules[operand] = _Passing()
    return model, without


def main() -> None:
    """Planning in forwards of ResNet-50; interception in three networks, eager and compiled."""
    images = torch.randn(1, 3, 224, 224)
    model = network("resnet50").eval()
    with torch.no_grad():
        print_ratios(
            "planning, ResNet-50 224x224, batch 1",
            {"forward": lambda: model(images), "plan": lambda: fq.plan(model, images)},
        )
        torch.set_num_threads(1)
        for name in ("resnet18", "resnet50", "mobilenet_v2"):
            with_sites, without = _with_and_without_sites(name, images)
            for compiled in (False,) if "--eager" in sys.argv else (False, True):
                runs = [torch.compile(m, fullgraph=True) if compiled else m for m in (without, with_sites)]
                print_ratios(
                    f"forward, {name} 224x224, batch 1, one thread, {'torch.compile' if compiled else 'eager'}",
                    {
                        "layers quantized": lambda run=runs[0], x=images: run(x),
                        "interception of its sites besides": lambda run=runs[1], x=images: run(x),
                    },
                    rounds=41,
                    clock=time.process_time,
                )


if __name__ == "__main__":
    main()
