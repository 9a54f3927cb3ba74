"""One quantization-aware training step against one float step, eager and compiled, and NVIDIA ModelOpt's.

``--eager`` leaves the compiled steps out. ModelOpt is measured where it is installed.
"""

import copy
import importlib.util
import sys

import torch
import torch.nn.functional as F
from networks import network
from timing import print_ratios
from torch import nn

import fakequant as fq
from fakequant.qat import save_memory

_IMAGES = torch.randn(16, 3, 64, 64)
_LEARNED = fq.QuantDescriptor(8, learn_amax="lsq"), fq.QuantDescriptor(8, axis=0, narrow_range=True, learn_amax="lsq")


def _step(model: nn.Module, compiled: bool) -> object:
    labels = torch.randint(1000, (len(_IMAGES),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(_IMAGES), labels).backward()
        optimizer.step()

    return step


def _quantized(*rules: fq.Rule, **options: object) -> nn.Module:
    model = network("resnet18")
    fq.quantize(model, sum(rules, fq.preset("int8")), **options)
    fq.calibrate(model, [_IMAGES], "max", progress=False)
    return model.train()


def _of_modelopt() -> nn.Module | None:
    if importlib.util.find_spec("modelopt") is None:
        print("\nNVIDIA ModelOpt is not installed: not measured")
        return None
    from modelopt.torch import quantization

    model = network("resnet18")
    return quantization.quantize(model, quantization.INT8_DEFAULT_CFG, lambda model: model(_IMAGES)).train()


def main() -> None:
    """ResNet-18, 64x64, batch 16; learned ranges are those of LSQ, of weights and activations.

    One of the images asks for their gradient, which the first convolution then computes.
    """
    learned = [fq.Rule(type=kind, input=_LEARNED[0], weight=_LEARNED[1]) for kind in ("Conv2d", "Linear")]
    but_the_images = [*learned, fq.Rule(name="conv1", input=fq.QuantDescriptor(8), weight=_LEARNED[1])]
    models = {
        "float": network("resnet18").train(),
        "QAT": _quantized(),
        "QAT, learned ranges": _quantized(*learned),
        "QAT, learned, but not of the images": _quantized(*but_the_images),
        "QAT, call sites": _quantized(example_inputs=(_IMAGES,)),
    }
    eager = {**models, "QAT, save_memory": save_memory(_quantized()), "NVIDIA ModelOpt": _of_modelopt()}
    print_ratios(
        "training step, ResNet-18 64x64, batch 16, eager",
        {name: _step(copy.deepcopy(model), False) for name, model in eager.items() if model is not None},
        rounds=15,
    )
    if "--eager" not in sys.argv:
        print_ratios(
            "training step, ResNet-18 64x64, batch 16, torch.compile, no graph break",
            {name: _step(model, True) for name, model in models.items()},
            rounds=15,
        )


if __name__ == "__main__":
    main()
