"""Trained networks on real data: the file gives the class that torch gives, for every image of the test set."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq
from fakequant.demo import quickstart

pytestmark = pytest.mark.slow

TARGETS = ("tensorrt", "onnxruntime")


class DigitTransformer(nn.Module):
    """Two encoder layers over 16 patches of 2x2 pixels, [N, 1, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.positions).mean(1))


def trained_transformer(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    model = DigitTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def trained_residual(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    model = quickstart.DigitNet()
    quickstart.train(model, (images, labels), epochs=15, learning_rate=0.1)
    return model


@pytest.fixture(scope="module", params=[trained_residual, trained_transformer], ids=["residual", "transformer"])
def reports(request, tmp_path_factory):
    """Return (accuracy of the float model in percent, {target: (accuracy of the quantized one, validation, file)})."""
    torch.manual_seed(0)
    training, test = quickstart.load_digits()
    model = request.param(*training)
    accuracy = quickstart.accuracy(model, test)
    data = training[0][:512].split(64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own nested tensors
        fq.quantize(model, example_inputs=data[0])
    fq.calibrate(model, data, method="mse", progress=False)
    folder, found = tmp_path_factory.mktemp("digits"), {}
    for target in TARGETS:
        path = folder / f"{target}.onnx"
        batch = ({0: torch.export.Dim("batch")},)
        fq.export_onnx(model, (data[0],), path, target=target, dynamic_shapes=batch)
        fq.retarget(model, target)
        found[target] = quickstart.accuracy(model, test), fq.validate_onnx(path, model, [test]), path
    return accuracy, found


BOTH = pytest.mark.parametrize("target", TARGETS)


@BOTH
def test_quantization_loses_nothing_that_can_be_seen(reports, target):
    assert reports[0] > 94
    assert reports[1][target][0] > reports[0] - 0.6


@BOTH
def test_unoptimized_every_image_gets_the_class_of_torch(reports, target):
    assert reports[1][target][1].simulated.top1_agreement == 1.0


@BOTH
def test_unoptimized_the_outputs_are_those_of_torch(reports, target):
    simulated = reports[1][target][1].simulated
    assert simulated.max_steps <= 1
    assert simulated.sqnr_db >= 50


@BOTH
def test_optimized_nearly_every_image_gets_the_class_of_torch(reports, target):
    optimized = reports[1][target][1].optimized
    assert optimized.max_steps <= 2
    assert optimized.top1_agreement >= 0.995


def test_tensorrt_would_take_the_file(reports):
    assert not fq.check_onnx(reports[1]["tensorrt"][2]).findings


def test_onnxruntime_computes_the_layers_in_integers(reports):
    inspected = fq.inspect_onnx(reports[1]["onnxruntime"][2])
    assert not [op for op in inspected.float_with_qdq if op.op_type in {"Conv", "Gemm", "MatMul"}]
    assert [op for op in inspected.integer_ops if op.op_type in {"Conv", "MatMul"}]
