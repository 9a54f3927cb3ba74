"""Files with sizes that are known when they run: any batch, any image, any length; and what cannot be dynamic."""

import warnings

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fakequant as fq

pytestmark = pytest.mark.slow

BOTH_EXPORTERS = pytest.mark.parametrize("opset", [17, 18])


class Network(nn.Module):
    """A small CNN, [N, 3, H, W] to [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        x = F.relu(self.conv(x) + x)
        x = F.interpolate(x, scale_factor=2.0)
        x = x + F.avg_pool2d(x, 3, 1, 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    """A layer of a transformer with attention, [N, L, 32] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v
        return x + F.gelu(self.out(y.transpose(1, 2).reshape(batch, length, 32)))


IMAGES = Network, {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}, [(2, 3, 32, 32), (1, 3, 48, 40), (3, 3, 24, 64)]
TEXTS = Encoder, {0: Dim("n"), 1: Dim("length")}, [(2, 24, 32), (1, 31, 32), (3, 5, 32)]


@BOTH_EXPORTERS
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize(("make", "dims", "shapes"), [IMAGES, TEXTS], ids=["images", "texts"])
def test_the_file_computes_what_torch_does_at_every_size(tmp_path, make, dims, shapes, target, opset):
    model, batches = make().eval(), [torch.randn(shape) for shape in shapes]
    fq.quantize(model, example_inputs=batches[0], target=target)
    fq.calibrate(model, batches, progress=False)
    path = tmp_path / "m.onnx"
    fq.export_onnx(model, (batches[0],), path, target=target, opset=opset, dynamic_shapes=(dims,))
    found = fq.validate_onnx(path, model, batches)
    assert found.simulated.max_steps <= 1
    assert found.simulated.sqnr_db >= 50
    assert found.optimized.max_steps <= 2


@BOTH_EXPORTERS
@pytest.mark.parametrize("make", [Network, Encoder])
def test_no_value_has_the_size_of_the_example(tmp_path, make, opset):
    model, shape = make().eval(), {Network: (7, 3, 32, 32), Encoder: (7, 24, 32)}[make]
    fq.quantize(model)
    fq.calibrate(model, [torch.randn(shape)], progress=False)
    fq.export_onnx(model, (torch.randn(shape),), tmp_path / "m.onnx", opset=opset, dynamic_shapes=({0: Dim("n")},))
    graph = ir.load(tmp_path / "m.onnx").graph
    shapes = [value.shape for node in graph for value in node.outputs if value.shape is not None]
    assert not [shape for shape in shapes if 7 in shape.dims]
    assert any("n" in map(str, shape.dims) for shape in shapes)


class Pair(nn.Module):
    """Two inputs, the second in a list and a dict."""

    def forward(self, x: Tensor, others: list[dict[str, Tensor]]) -> Tensor:
        return x + others[0]["y"]


def input_shapes(path) -> dict[str, list[int | str | None]]:
    values = ir.load(path).graph.inputs
    return {value.name: [size if isinstance(size, int) else size.value for size in value.shape] for value in values}


N = Dim("n")


@pytest.mark.parametrize(
    ("dynamic_shapes", "expected"),
    [
        (({0: N}, [{"y": {0: N}}]), (["n", 3], ["n", 3])),
        ([{0: N}, [{"y": {0: N}}]], (["n", 3], ["n", 3])),
        ({"x": {0: N}, "others": [{"y": {0: N}}]}, (["n", 3], ["n", 3])),
        ({"others": [{"y": (N, 3)}], "x": [N, Dim.STATIC]}, (["n", 3], ["n", 3])),
        (({0: "n"}, [{"y": ("n", None)}]), (["n", 3], ["n", 3])),
        (({0: Dim.DYNAMIC}, [{"y": {0: Dim.AUTO}}]), (["x_0", 3], ["others_0_y_0", 3])),
        (({0: 2 * N}, [{"y": {0: 2 * N}}]), (["2*n", 3], ["2*n", 3])),
        ((None, [{"y": None}]), ([4, 3], [4, 3])),
        ((None, None), ([4, 3], [4, 3])),
        (None, ([4, 3], [4, 3])),
    ],
    ids=["tuple", "list", "names", "by-axis", "strings", "automatic", "derived", "none", "no-tree", "nothing"],
)
def test_torchscript_takes_the_shapes_of_torch_export(tmp_path, dynamic_shapes, expected):
    args = torch.randn(4, 3), [{"y": torch.randn(4, 3)}]
    fq.export_onnx(Pair(), args, tmp_path / "m.onnx", opset=17, dynamic_shapes=dynamic_shapes)
    assert input_shapes(tmp_path / "m.onnx") == dict(zip(("x", "others_0_y"), expected, strict=True))


@BOTH_EXPORTERS
@pytest.mark.parametrize(
    ("dynamic_shapes", "message"),
    [
        (({0: N},), r"dynamic_shapes: expected an entry for each of x, others, got \("),
        ({"x": {0: N}}, r"dynamic_shapes: expected an entry for each of x, others, got \{"),
        ({"x": {0: N}, "z": None}, r"dynamic_shapes: expected an entry for each of x, others, got \{"),
        (({0: N}, []), "dynamic_shapes: expected the structure of args, got none for others_0_y"),
        (({0: N}, [{}]), "dynamic_shapes: expected the structure of args, got none for others_0_y"),
        (({2: N}, None), r"dynamic_shapes: expected axes of x with shape \(4, 3\), got 2 among them"),
        (({-1: N}, None), r"dynamic_shapes: expected axes of x with shape \(4, 3\), got -1 among them"),
    ],
    ids=["short", "missing", "unknown", "no-list", "no-dict", "axis", "negative-axis"],
)
def test_shapes_that_do_not_fit_the_arguments_are_an_error(tmp_path, dynamic_shapes, message, opset):
    args = torch.randn(4, 3), [{"y": torch.randn(4, 3)}]
    with pytest.raises(fq.ExportError, match=message):
        fq.export_onnx(Pair(), args, tmp_path / "m.onnx", opset=opset, dynamic_shapes=dynamic_shapes)
    assert list(tmp_path.iterdir()) == []


class Fixed(nn.Module):
    """Computes with the size of the example."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3) * 2


@pytest.mark.parametrize("dim", [N, Dim.AUTO], ids=["named", "automatic"])
def test_a_dimension_that_torch_export_made_constant_is_an_error(tmp_path, dim):
    with pytest.raises(fq.ExportError, match="expected axis 0 of x to be dynamic, got 4 as its only size"):
        fq.export_onnx(Fixed(), (torch.randn(4, 3),), tmp_path / "m.onnx", opset=18, dynamic_shapes=({0: dim},))
    assert list(tmp_path.iterdir()) == []


class ReadsSize(nn.Module):
    """Takes the size of its input as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.shape[0])


def test_a_size_that_is_read_as_a_number_is_warned_of_below_opset_18(tmp_path):
    with pytest.warns(UserWarning, match=r"test_dynamic_shapes\.py:\d+ reads a size or value of a tensor as a number"):
        fq.export_onnx(ReadsSize(), (torch.randn(4, 3),), tmp_path / "m.onnx", opset=17, dynamic_shapes=({0: N},))


def test_without_dynamic_dimensions_it_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.export_onnx(ReadsSize(), (torch.randn(4, 3),), tmp_path / "m.onnx", opset=17)
