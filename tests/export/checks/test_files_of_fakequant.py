"""What fakequant exports for TensorRT breaks no rule of TensorRT."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fakequant as fq
from fakequant.export import CheckReport


class Attention(nn.Module):
    """A patch embedding, one transformer block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 32)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class MaskedAttention(nn.Module):
    """An attention whose mask depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=x[:, None, :, :1].transpose(2, 3))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class Neck(nn.Module):
    """Two levels of a YOLO: split and concatenation, pooling pyramid, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = conv(3, 32, 3, 2), conv(32, 64, 3, 2)
        self.narrow, self.pool, self.pyramid = conv(64, 32), nn.MaxPool2d(5, 1, 2), conv(96, 64)
        self.up, self.top = nn.Upsample(scale_factor=2), conv(96, 64)
        self.bottleneck, self.head = nn.Sequential(conv(32, 32, 3), conv(32, 32, 3)), nn.Conv2d(96, 24, 1)

    def forward(self, images: Tensor) -> Tensor:
        low = self.low(images)
        narrow = self.narrow(self.high(low))
        once = self.pool(narrow)
        high = self.pyramid(torch.cat((narrow, once, self.pool(once)), 1))
        left, right = self.top(torch.cat((self.up(high), low), 1)).chunk(2, 1)
        return self.head(torch.cat((left, right, right + self.bottleneck(right)), 1))


@pytest.fixture
def check_exports(tmp_path):
    """Quantize, calibrate and export a model in both forms of weights; return both reports."""

    def run(model: nn.Module, x: Tensor, **options: object) -> list[CheckReport]:
        model.eval()
        fq.quantize(model, example_inputs=x, target="tensorrt")
        fq.calibrate(model, [x], progress=False)
        reports = []
        for weights in ("int8", "float"):
            fq.export_onnx(model, (x,), tmp_path / f"{weights}.onnx", weights=weights, **options)
            reports.append(fq.check_onnx(tmp_path / f"{weights}.onnx"))
        return reports

    return run


def assert_clean(reports: list[CheckReport]) -> None:
    for report in reports:
        assert (report.findings, report.notes) == ((), ())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_torchvision(torchvision_models, check_exports, name):
    assert_clean(check_exports(getattr(torchvision_models, name)(), torch.randn(2, 3, 64, 64)))


@pytest.mark.parametrize("opset", [18, 19, 20, 21])
def test_every_opset(check_exports, opset):
    model = nn.Sequential(conv(3, 16, 3), conv(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16))
    assert_clean(check_exports(model, torch.randn(2, 3, 8, 8), opset=opset))


def test_vision_transformer(check_exports):
    assert_clean(check_exports(Attention(), torch.randn(2, 3, 32, 32)))


def test_masked_attention(check_exports):
    assert_clean(check_exports(MaskedAttention(), torch.randn(2, 20, 64)))


def test_yolo_neck(check_exports):
    assert_clean(check_exports(Neck(), torch.randn(2, 3, 32, 32)))


def test_dynamic_batch(check_exports):
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=8)},)
    model = nn.Sequential(conv(3, 16, 3), conv(16, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3))
    assert_clean(check_exports(model, torch.randn(2, 3, 16, 16), dynamic_shapes=shapes))


def test_transposed_convolution(check_exports):
    model = nn.Sequential(conv(3, 32, 3), nn.ConvTranspose2d(32, 16, 2, 2))
    assert_clean(check_exports(model, torch.randn(1, 3, 8, 8)))


def test_a_one_dimensional_convolution_that_stays_float_is_no_finding(check_exports):
    model = nn.Sequential(nn.Conv1d(16, 32, 3), nn.Flatten(), nn.Linear(960, 16))
    assert all(report.findings == () for report in check_exports(model, torch.randn(1, 16, 32)))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="R38: the input quantizer of a convolution stands behind the pad, not before it",
)
def test_padded_convolution(check_exports):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ZeroPad2d(1), nn.Conv2d(32, 32, 3))
    assert_clean(check_exports(model, torch.randn(1, 3, 16, 16)))


def test_grouped_transposed_convolution(check_exports):
    model = nn.Sequential(conv(3, 32, 3), nn.ConvTranspose2d(32, 32, 2, 2, groups=2))
    assert_clean(check_exports(model, torch.randn(1, 3, 8, 8)))


class FactorAttention(nn.Module):
    """As in CoaT: the softmax of k itself, then two products without one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q @ (k.softmax(1).transpose(-2, -1) @ v)


def test_attention_without_scores(check_exports):
    assert_clean(check_exports(FactorAttention(), torch.randn(2, 24, 32)))
