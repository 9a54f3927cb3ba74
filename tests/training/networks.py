"""Tiny classifiers of each kind, their data, and how they are quantized and trained. Loaded in other processes too."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq

CLASSES = 3


class Residual(nn.Module):
    """A convolution and a batch norm around which the input goes: the add is a call site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Encoder(nn.Module):
    """A transformer encoder layer, whose attention and adds are call sites, and a mean over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).mean(1))


class Lstm(nn.Module):
    """The last step of an LSTM. torch.compile breaks its graph there, of a float model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


class Cell(nn.Module):
    """The same step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0])


def _convolutions(*middle: nn.Module) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *middle, *head)


NETWORKS = {
    "cnn": lambda: _convolutions(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "residual": lambda: _convolutions(Residual(8), Residual(8)),
    "transformer": Encoder,
    "lstm": Lstm,
    "cell": Cell,
}


def float_network(name: str) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return NETWORKS[name]()


def data(name: str) -> tuple[Tensor, Tensor]:
    """Eight samples and their classes, the same in every process."""
    shape = (8, 3, 8, 8) if name in ("cnn", "residual") else (8, 5, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(8) % CLASSES


def quantized(name: str, *, learned: bool = False, calibrated: bool = True) -> nn.Module:
    """A network in training mode, with quantizers on each layer, however small, and on its call sites.

    Args:
        name: of the network.
        learned: learn the ranges of convolutions and linear layers.
        calibrated: on its data.
    """
    model, (x, _) = float_network(name), data(name)
    weight = fq.QuantDescriptor(learn_amax="lsq", narrow_range=True)
    grids = {"input": fq.QuantDescriptor(learn_amax="lsq"), "weight": weight} if learned else {}
    recipe = fq.preset("int8") + fq.Rule(type="Linear", force=True, **grids)
    if name in ("cnn", "residual"):
        recipe = recipe + fq.Rule(type="Conv2d", force=True, **grids)
    if name == "lstm":
        recipe = recipe + fq.Rule(type="LSTM")
    fq.quantize(model, recipe, example_inputs=x)
    if calibrated:
        fq.calibrate(model, [x], progress=False)
    return model.train()


PRECISIONS = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
"""The dtype that the model is held in, and that of autocast."""


def forward(model: nn.Module, x: Tensor, precision: str = "float32") -> Tensor:
    """Return the model's output on x; the model is held in the precision's dtype already."""
    held, cast = PRECISIONS[precision]
    context = contextlib.nullcontext() if cast is None else torch.autocast("cpu", cast)
    with context:
        return model(x.to(held))


def train(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str = "float32", steps: int = 3) -> list[float]:
    """Return the loss of every step, and leave the gradients of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(model, batch[0], precision).float(), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
