"""YOLO-type detectors, written from their papers and configurations; raw tensors of the heads, no decoding.

All at the narrowest width of their series (v7-tiny at half of its own). What matters for quantization is as there: SiLU
after every BatchNorm, residual adds, chunk and concatenation, pooling pyramids, nearest
upsampling in the neck.
"""

import torch
from architecture import Architecture
from torch import Tensor, nn

_CLASSES = 80
_ANCHORS = 3


class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """Two convolutions, with or without a residual add."""

    def __init__(self, channels: int, shortcut: bool, kernels: tuple[int, int]) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, kernels[0])
        self.cv2 = Conv(channels, channels, kernels[1])
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.shortcut else self.cv2(self.cv1(x))


class C3(nn.Module):
    """YOLOv5: a branch of bottlenecks beside a branch of one convolution, concatenated."""

    def __init__(self, inputs: int, outputs: int, number: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Conv(inputs, hidden)
        self.cv2 = Conv(inputs, hidden)
        self.cv3 = Conv(2 * hidden, outputs)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, (1, 3)) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """YOLOv8: one convolution split in two halves; every bottleneck's output is concatenated."""

    def __init__(self, inputs: int, outputs: int, number: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Conv(inputs, 2 * hidden)
        self.cv2 = Conv((2 + number) * hidden, outputs)
        self.m = nn.ModuleList(Bottleneck(hidden, shortcut, (3, 3)) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class ELAN(nn.Module):
    """YOLOv7-tiny: four branches, each a convolution deeper, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Conv(inputs, hidden)
        self.cv2 = Conv(inputs, hidden)
        self.cv3 = Conv(hidden, hidden, 3)
        self.cv4 = Conv(hidden, hidden, 3)
        self.cv5 = Conv(4 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        skipped, first = self.cv1(x), self.cv2(x)
        second = self.cv3(first)
        return self.cv5(torch.cat((self.cv4(second), second, first, skipped), 1))


class SPPF(nn.Module):
    """YOLOv5 and v8: one pooling three times over, all four concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPCSPC(nn.Module):
    """YOLOv7-tiny: three poolings of different sizes beside a branch of one convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, outputs)
        self.cv2 = Conv(inputs, outputs)
        self.cv3 = Conv(4 * outputs, outputs)
        self.cv4 = Conv(2 * outputs, outputs)
        self.pools = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in (13, 9, 5))

    def forward(self, x: Tensor) -> Tensor:
        first = self.cv1(x)
        pooled = self.cv3(torch.cat([*(pool(first) for pool in self.pools), first], 1))
        return self.cv4(torch.cat((pooled, self.cv2(x)), 1))


class Focus(nn.Module):
    """YOLOX: every second pixel into channels."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(corners, 1))


class Neck(nn.Module):
    """PANet: down from the deepest level by nearest upsampling, up again by strided convolutions.

    Args:
        channels: of the levels P3, P4, P5.
        block: the stage's block, such as C3.
        lateral: the upsampled map first passes a 1x1 convolution (v5, v7, X) or not (v8).
    """

    def __init__(self, channels: tuple[int, int, int], block: type[nn.Module], lateral: bool) -> None:
        super().__init__()
        p3, p4, p5 = channels
        plain = {} if block is ELAN else {"shortcut": False}
        self.lateral5 = Conv(p5, p4) if lateral else nn.Identity()
        self.lateral4 = Conv(p4, p3) if lateral else nn.Identity()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4 = block((p4 if lateral else p5) + p4, p4, **plain)
        self.top3 = block((p3 if lateral else p4) + p3, p3, **plain)
        self.down3, self.down4 = Conv(p3, p3, 3, 2), Conv(p4, p4, 3, 2)
        self.bottom4 = block(p3 + (p3 if lateral else p4), p4, **plain)
        self.bottom5 = block(p4 + (p4 if lateral else p5), p5, **plain)

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        p3, p4, p5 = levels
        narrow5 = self.lateral5(p5)
        narrow4 = self.lateral4(self.top4(torch.cat((self.up(narrow5), p4), 1)))
        out3 = self.top3(torch.cat((self.up(narrow4), p3), 1))
        out4 = self.bottom4(torch.cat((self.down3(out3), narrow4), 1))
        return out3, out4, self.bottom5(torch.cat((self.down4(out4), narrow5), 1))


class AnchorHead(nn.Module):
    """YOLOv5 and v7: one 1x1 convolution a level; anchors, then box, objectness and classes last."""

    def __init__(self, channels: tuple[int, int, int], before: bool) -> None:
        super().__init__()
        self.before = nn.ModuleList(Conv(c, 2 * c, 3) if before else nn.Identity() for c in channels)
        self.m = nn.ModuleList(nn.Conv2d((1 + before) * c, _ANCHORS * (5 + _CLASSES), 1) for c in channels)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = []
        for level, before, conv in zip(levels, self.before, self.m, strict=True):
            x = conv(before(level))
            batch, _, height, width = x.shape
            outputs.append(x.view(batch, _ANCHORS, 5 + _CLASSES, height, width).permute(0, 1, 3, 4, 2).contiguous())
        return tuple(outputs)


class DecoupledHead(nn.Module):
    """YOLOv8 without DFL, and YOLOX: boxes and classes by convolutions of their own, levels concatenated.

    Args:
        channels: of the levels.
        stem: a 1x1 convolution before both branches, and objectness beside the box (X), or not (v8).
    """

    def __init__(self, channels: tuple[int, int, int], stem: bool) -> None:
        super().__init__()
        hidden = channels[0]
        starts = [hidden if stem else c for c in channels]
        self.stems = nn.ModuleList(Conv(c, hidden) if stem else nn.Identity() for c in channels)
        self.boxes = nn.ModuleList(self._branch(c, hidden, 4 + stem) for c in starts)
        self.classes = nn.ModuleList(self._branch(c, max(hidden, _CLASSES), _CLASSES) for c in starts)

    @staticmethod
    def _branch(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(Conv(inputs, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, outputs, 1))

    def forward(self, levels: tuple[Tensor, ...]) -> Tensor:
        outputs = []
        for level, stem, boxes, classes in zip(levels, self.stems, self.boxes, self.classes, strict=True):
            x = stem(level)
            outputs.append(torch.cat((boxes(x), classes(x)), 1).flatten(2))
        return torch.cat(outputs, 2)


class Detector(nn.Module):
    """Backbone stages to P3, P4 and P5, neck, head."""

    def __init__(self, stages: tuple[nn.Module, nn.Module, nn.Module], neck: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stage3, self.stage4, self.stage5 = stages
        self.neck = neck
        self.head = head

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        p3 = self.stage3(images)
        p4 = self.stage4(p3)
        return self.head(self.neck((p3, p4, self.stage5(p4))))


_CHANNELS = (64, 128, 256)


def _stages(stem: nn.Module, block: type[nn.Module], depth: tuple[int, int, int, int]) -> tuple[nn.Module, ...]:
    """Return the stages of v5, v8 and X: a strided convolution and a block, four times; SPPF at the end."""
    first = (stem, Conv(16, 32, 3, 2), block(32, 32, depth[0]), Conv(32, 64, 3, 2), block(64, 64, depth[1]))
    return (
        nn.Sequential(*first),
        nn.Sequential(Conv(64, 128, 3, 2), block(128, 128, depth[2])),
        nn.Sequential(Conv(128, 256, 3, 2), block(256, 256, depth[3]), SPPF(256)),
    )


def yolov5n() -> nn.Module:
    """C3 blocks, SPPF, PANet, one convolution a level."""
    stages = _stages(Conv(3, 16, 6, 2), C3, (1, 2, 3, 1))
    return Detector(stages, Neck(_CHANNELS, C3, lateral=True), AnchorHead(_CHANNELS, before=False))


def yolov7_tiny() -> nn.Module:
    """ELAN blocks, SPPCSPC, PANet, a convolution before each level's last; SiLU in place of LeakyReLU."""
    stages = (
        nn.Sequential(Conv(3, 16, 3, 2), Conv(16, 32, 3, 2), ELAN(32, 32), nn.MaxPool2d(2, 2), ELAN(32, 64)),
        nn.Sequential(nn.MaxPool2d(2, 2), ELAN(64, 128)),
        nn.Sequential(nn.MaxPool2d(2, 2), ELAN(128, 256), SPPCSPC(256, 256)),
    )
    return Detector(stages, Neck(_CHANNELS, ELAN, lateral=True), AnchorHead(_CHANNELS, before=True))


def yolov8n() -> nn.Module:
    """C2f blocks, SPPF, PANet without lateral convolutions, decoupled head with DFL off."""
    stages = _stages(Conv(3, 16, 3, 2), C2f, (1, 2, 2, 1))
    return Detector(stages, Neck(_CHANNELS, C2f, lateral=False), DecoupledHead(_CHANNELS, stem=False))


def yolox_n() -> nn.Module:
    """Focus, C3 blocks, PANet, decoupled head with stems and objectness."""
    stages = _stages(Focus(16), C3, (1, 3, 3, 1))
    return Detector(stages, Neck(_CHANNELS, C3, lateral=True), DecoupledHead(_CHANNELS, stem=True))


ARCHITECTURES = tuple(
    Architecture(build.__name__, "YOLO", lambda build=build: (build(), (torch.randn(2, 3, 128, 128),)))
    for build in (yolov5n, yolov7_tiny, yolov8n, yolox_n)
)
