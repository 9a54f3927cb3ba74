"""What a training step keeps for backward, and its peak: of the float step, QAT, and QAT that saves memory."""

import torch
from live_memory import StepMemory, kept_when_compiled, step_memory
from networks import network
from torch import nn

import fakequant as fq
from fakequant.qat import save_memory

_INPUT = fq.QuantDescriptor(8, learn_amax="lsq")
_WEIGHT = fq.QuantDescriptor(8, axis=0, narrow_range=True, learn_amax="lsq")
_KINDS = ("Conv2d", "Linear", "MultiheadAttention", "LSTM")
_RECIPES = {
    "fixed ranges": fq.Recipe(defaults=tuple(fq.Rule(type=kind) for kind in _KINDS)),
    "learned ranges": fq.Recipe(defaults=tuple(fq.Rule(type=kind, input=_INPUT, weight=_WEIGHT) for kind in _KINDS)),
}


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(64, 64, 2), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


_CASES = {
    "ResNet-18 64x64, batch 16": (lambda: network("resnet18"), (16, 3, 64, 64)),
    "MobileNetV2 64x64, batch 8": (lambda: network("mobilenet_v2"), (8, 3, 64, 64)),
    "encoder, 3 layers, d 128, 4 x 64 tokens": (_encoder, (4, 64, 128)),
    "LSTM of 64, 2 layers, 16 steps, batch 8": (_Lstm, (16, 8, 64)),
}


def _memory(model: nn.Module, x: torch.Tensor, autocast: bool) -> StepMemory:
    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().mean()

    return step_memory(loss)


def _quantized(model: nn.Module, x: torch.Tensor, recipe: fq.Recipe, sites: bool) -> nn.Module:
    if sites:
        fq.quantize(model, recipe, example_inputs=(x,))
    else:
        fq.quantize(model, recipe)
    fq.calibrate(model, [x], "max", progress=False)
    return model.train()


def _weights(model: nn.Module) -> int:
    """Return the bytes of the quantized weights: QAT keeps a copy of each, however small the batch."""
    layers = [module for module in model.modules() if isinstance(module, fq.nn.QuantMixin)]
    return sum(getattr(layer, name).nbytes for layer in layers for name in layer.weight_names)


def _compiled() -> None:
    """Without the LSTM, which breaks the graph inside torch."""
    for title, (make, shape) in list(_CASES.items())[:3]:
        x = torch.randn(shape)
        base = kept_when_compiled(make().train(), x)
        print(f"\ncompiled, {title}: float keeps {base / 2**20:.1f} MiB")
        for name, recipe in _RECIPES.items():
            torch.compiler.reset()
            model = _quantized(make(), x, recipe, False)
            kept = kept_when_compiled(model, x)
            weights = _weights(model)
            print(f"  {name:<28} keeps {kept / base:.2f} ({(kept - weights) / base:.2f} without weights)", flush=True)


def main() -> None:
    """Four networks, with and without call sites, fixed and learned ranges, float32 and autocast; three compiled."""
    torch.set_num_threads(1)
    _compiled()
    for title, (make, shape) in _CASES.items():
        x = torch.randn(shape)
        for autocast in (False, True):
            base = _memory(make().train(), x, autocast)
            print(f"\nmemory of a training step, {title}{', autocast' if autocast else ''}; 1.0 is the float step")
            print(f"  float keeps {base.kept / 2**20:.1f} MiB, peak {base.peak / 2**20:.1f} MiB")
            for sites in (False,) if "LSTM" in title else (False, True):
                for name, recipe in _RECIPES.items():
                    model = _quantized(make(), x, recipe, sites)
                    plain = _memory(model, x, autocast)
                    model.zero_grad()
                    saving = _memory(save_memory(model), x, autocast)
                    weights = "" if autocast else f" ({(plain.kept - _weights(model)) / base.kept:.2f} without weights)"
                    print(
                        f"  {name + (', call sites' if sites else ''):<28} keeps {plain.kept / base.kept:.2f}{weights}"
                        f", peak {plain.peak / base.peak:.2f}; "
                        f"save_memory keeps {saving.kept / base.kept:.2f}, peak {saving.peak / base.peak:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
