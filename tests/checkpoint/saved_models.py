"""The family of quantized models that are saved: how each is built, quantized and called.

This file is loaded by the conftest, and in another process, which has no more than the float models.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant import QuantDescriptor
from fakequant.qat import fold_batchnorm


class Block(nn.Module):
    """A convolution, a batch norm, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


class ConvNet(nn.Module):
    """A layer that is small for TensorRT, a block called twice, a block of two names, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 6, 1)
        self.wide = nn.Conv2d(6, 16, 1)
        self.twice = Block()
        self.once = Block()
        self.again = self.once.bn
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.once(self.twice(self.twice(F.relu(self.wide(F.relu(self.small(x)))))))
        return self.fc(F.gelu(self.up(F.gelu(x))).mean((2, 3)))


class Language(nn.Module):
    """An embedding, a transformer layer, and a head whose weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class Recurrent(nn.Module):
    """An LSTM and a cell behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        sequences, _ = self.lstm(x)
        state = None
        for step in sequences.unbind(1):
            state = self.cell(step, state)
        return state


class Doubled(fq.nn.QuantLinear):
    """A user's own quantized layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ByHand(nn.Module):
    """Quantizers that its own code makes, as pytorch-quantization's ResNet does, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Doubled(8, 8)
        self.skip_quantizer = fq.TensorQuantizer()
        self.conv = nn.Conv1d(8, 8, 1)
        self.again = self.skip_quantizer

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.first(x)) + self.skip_quantizer(x)
        return self.conv(y.unsqueeze(-1)).squeeze(-1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One member of the family.

    Args:
        build: the float model.
        quantize: it, in place, by one batch.
        shape: of a batch.
    """

    build: Callable[[], nn.Module]
    quantize: Callable[[nn.Module, Tensor], object]
    shape: tuple[int, ...]

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if self.build is Language:
            return torch.randint(12, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)

    def float_model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().eval()

    def model(self) -> nn.Module:
        model = self.float_model()
        self.quantize(model, self.batch())
        return model.train(model.training)  # its quantizers too


IMAGES, VECTORS, SEQUENCES, TOKENS = (2, 3, 6, 6), (4, 8), (2, 3, 8), (2, 5)


def placed(recipe: fq.Recipe | str = "int8", target: str = "tensorrt") -> Callable[[nn.Module, Tensor], None]:
    def quantize(model: nn.Module, x: Tensor) -> None:
        fq.quantize(model, recipe, example_inputs=(x,), target=target)
        fq.calibrate(model, [x], progress=False)

    return quantize


def by_layers(recipe: fq.Recipe | str = "int8") -> Callable[[nn.Module, Tensor], None]:
    def quantize(model: nn.Module, x: Tensor) -> None:
        fq.quantize(model, recipe)
        fq.calibrate(model, [x], progress=False)

    return quantize


def on(input: QuantDescriptor | None, weight: QuantDescriptor | None, type: str = "*") -> fq.Recipe:
    return fq.preset("int8") + fq.Rule(type=type, input=input, weight=weight)


def not_calibrated(model: nn.Module, x: Tensor) -> None:
    fq.quantize(model, example_inputs=(x,), target="onnxruntime")


def in_training(model: nn.Module, x: Tensor) -> None:
    placed()(model, x)
    fold_batchnorm(model, (x,))
    fq.freeze_batchnorm(model.once)
    fq.follow_ranges(model, 0.25)
    model.fc.weight_quantizer.disable()
    model.up.input_quantizer.enable_calib()
    model.train()


LEARNED = QuantDescriptor(4, affine=True, learn_amax="lsq+"), QuantDescriptor(4, axis=0, learn_amax="lsq")


def with_a_frozen_range(model: nn.Module, x: Tensor) -> None:
    by_layers(on(*LEARNED))(model, x)
    model.first.weight_quantizer.requires_grad_(False)


def with_a_frozen_range_that_stands_by(model: nn.Module, x: Tensor) -> None:
    placed(on(*LEARNED), target="onnxruntime")(model, x)
    model.small.weight_quantizer.requires_grad_(False)
    fq.retarget(model, "tensorrt")
    assert model.small._weight_quantizer.stands_by


def patched() -> nn.Module:
    with fq.patched_torch_nn():
        return ConvNet()


def calibrated(model: nn.Module, x: Tensor) -> None:
    fq.calibrate(model, [x], progress=False)


CASES = {
    "placed": Case(ConvNet, placed(), IMAGES),
    "placed for onnxruntime": Case(ConvNet, placed(target="onnxruntime"), IMAGES),
    "not calibrated": Case(ConvNet, not_calibrated, IMAGES),
    "in training": Case(ConvNet, in_training, IMAGES),
    "layers": Case(ConvNet, by_layers(), IMAGES),
    "patched": Case(patched, calibrated, IMAGES),
    "patched, then placed": Case(patched, placed(), IMAGES),
    "transformer": Case(Language, by_layers(), TOKENS),
    "transformer, placed": Case(Language, placed(fq.preset("int8") + fq.Rule(type="Embedding")), TOKENS),
    "dynamic LSTM": Case(Recurrent, lambda model, x: fq.quantize(model, "dynamic-lstm"), SEQUENCES),
    "recurrent, placed": Case(Recurrent, placed(on(QuantDescriptor(8), None, "LSTM")), SEQUENCES),
    "by hand": Case(ByHand, by_layers(), VECTORS),
    "learned": Case(ByHand, with_a_frozen_range, VECTORS),
    "learned, placed": Case(ConvNet, with_a_frozen_range_that_stands_by, IMAGES),
    "affine histograms": Case(
        ConvNet, placed(on(QuantDescriptor(8, affine=True, calib_method="histogram"), QuantDescriptor(8))), IMAGES
    ),
    "per token": Case(ByHand, by_layers("dynamic-per-token"), VECTORS),
    "blocks": Case(ByHand, by_layers(on(None, QuantDescriptor(4, block_size=4), "Linear")), VECTORS),
    "ternary": Case(ByHand, by_layers(on(QuantDescriptor(8, amax=2.0), QuantDescriptor(2, scheme="twn"))), VECTORS),
    "fp8": Case(ConvNet, placed("fp8"), IMAGES),
}
