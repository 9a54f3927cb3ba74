"""Files of models with call sites: Q/DQ where the plan says, shared where it says, and the same numbers."""

import onnxscript
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant.call_sites import ops
from fakequant.call_sites.custom import TRANSLATIONS
from fakequant.nn.walk import named_quantizers


class Net(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function, **children) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def conv(inputs=16, outputs=16):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


@pytest.fixture
def placed(tmp_path):
    """Quantize with an example, calibrate, export."""

    def run(model, *args, recipe="int8", **options):
        model.eval()
        fq.quantize(model, recipe, example_inputs=args)
        fq.calibrate(model, [args], progress=False, forward=lambda model, args: model(*args))
        path = tmp_path / "model.onnx"
        report = fq.export_onnx(model, args, path, **options)
        return model, path, report

    return run


@pytest.fixture
def image():
    return torch.randn(2, 16, 8, 8)


NETS = {
    "residual": lambda: Net(lambda m, x: F.relu(m.a(x) + x), a=conv()),
    "in place": lambda: Net(lambda m, x: m.a(x).add_(x).relu_(), a=conv()),
    "cat of branches": lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x], 1)), a=conv(), b=conv(), c=conv(48)),
    "halves": lambda: Net(lambda m, x: m.b(m.a(x).chunk(2, 1)[1].repeat(1, 2, 1, 1)), a=conv(), b=conv()),
    "shared head": lambda: Net(lambda m, x: m.a(x) + m.a(F.max_pool2d(x, 2)).mean(), a=conv()),
    "average": lambda: Net(lambda m, x: m.fc(m.a(x).mean((2, 3))), a=conv(), fc=nn.Linear(16, 16)),
    "functional": lambda: Net(lambda m, x: F.conv2d(x, m.w, padding=1), w=nn.Parameter(torch.randn(16, 16, 3, 3))),
    "product with a weight": lambda: Net(lambda m, x: x.mean((2, 3)) @ m.w, w=nn.Parameter(torch.randn(16, 24))),
    "computed weight": lambda: Net(
        lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True)), w=nn.Parameter(torch.randn(16, 16, 3, 3))
    ),
}


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("net", NETS)
def test_the_file_computes_what_torch_does(net, weights, placed, image):
    model, path, report = placed(NETS[net](), image, weights=weights)
    found = fq.validate_onnx(path, model, [image])
    assert found.simulated.max_steps == 0
    assert found.optimized.max_steps <= 1
    assert report.not_in_file == ()


@pytest.mark.parametrize("net", ["product with a weight", "functional"])
def test_weights_of_functional_calls_are_stored_as_integers(net, placed, image):
    _, _, report = placed(NETS[net](), image)
    assert report.integer_weights == 1


@pytest.mark.parametrize("net", NETS)
def test_every_quantizer_is_in_the_report_under_its_name(net, placed, image):
    model, _, report = placed(NETS[net](), image)
    assert set(report.quantizers) == {name for name, quantizer in named_quantizers(model) if quantizer.is_enabled}


class Attention(nn.Module):
    """Self-attention, [N, 24, 32] to the same."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax((q * 0.25) @ k.transpose(-2, -1), -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "scaled_dot_product_attention"])
def test_attention(fused, placed):
    x = torch.randn(2, 24, 32)
    model, path, report = placed(Attention(fused), x)
    found = fq.validate_onnx(path, model, [x])
    assert found.simulated.max_steps <= 1
    assert found.quantized_ops == 4  # two layers, two products
    assert report.not_in_file == ()


@pytest.mark.parametrize("fast", [False, True], ids=["need_weights", "no weights"])
def test_multihead_attention(fast, placed):
    x = torch.randn(2, 24, 32)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    model, path, _ = placed(Net(lambda m, x: m.a(x, x, x, need_weights=not fast)[0], a=attention), x)
    found = fq.validate_onnx(path, model, [x])
    assert found.simulated.max_steps <= 1
    assert found.quantized_ops == 4


@pytest.fixture
def scale_rows(monkeypatch):
    """A custom op that torch.onnx does not know, registered."""
    monkeypatch.setattr(ops, "_OPS", dict(ops._OPS))
    for table in (ops._OP_OF, ops.KIND_OF, TRANSLATIONS):
        for key in set(table):
            monkeypatch.setitem(table, key, table[key])  # so that what is added is removed
    before = {id(table): set(table) for table in (ops._OP_OF, ops.KIND_OF, TRANSLATIONS)}

    @torch.library.custom_op("fakequant_test::scale_rows", mutates_args=())
    def scale_rows(x: Tensor, w: Tensor) -> Tensor:
        return x * w[:, None]

    @scale_rows.register_fake
    def _(x: Tensor, w: Tensor) -> Tensor:
        return torch.empty_like(x)

    op = onnxscript.opset18
    fq.register_op(scale_rows, inputs=("x",), weights={"w": None}, onnx=lambda x, w: op.Mul(x, op.Unsqueeze(w, [1])))
    yield scale_rows
    for table in (ops._OP_OF, ops.KIND_OF, TRANSLATIONS):
        for key in set(table) - before[id(table)]:
            del table[key]


def test_a_custom_op_is_exported_with_its_quantizers(scale_rows, placed):
    x = torch.randn(4, 32)
    model = Net(lambda m, x: m.fc(scale_rows(x, m.w)), fc=nn.Linear(32, 32), w=nn.Parameter(torch.rand(4)))
    model, path, report = placed(model, x)
    assert fq.validate_onnx(path, model, [x]).simulated.max_steps == 0
    assert report.not_in_file == ()
    assert {"_call_sites.scale_rows_0.x", "_call_sites.scale_rows_0.w"} <= {q for q, _ in named_quantizers(model)}
