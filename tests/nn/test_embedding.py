"""What the battery of quantized modules does not say of embeddings and bilinear layers."""

import onnx
import pytest
import torch
from torch import nn

import fakequant
from fakequant import Rule, preset
from fakequant.errors import ExportError
from fakequant.nn import QuantBilinear, QuantEmbedding, QuantEmbeddingBag

INDICES = torch.tensor([[0, 2, 2], [1, 0, 4]])
both = pytest.mark.parametrize("cls", [QuantEmbedding, QuantEmbeddingBag])


def calibrated(cls, **kwargs):
    module = cls(5, 4, **kwargs)
    fakequant.calibrate(module, [INDICES], progress=False)
    return module


def test_padding_row_stays_zero():
    module = calibrated(QuantEmbedding, padding_idx=2)
    assert torch.equal(module(INDICES)[0, 1], torch.zeros(4))


@both
def test_float_rows_are_renormalized_as_torchs(cls):
    module = cls(5, 4, max_norm=0.5)
    expected = cls.float_class(5, 4, max_norm=0.5)
    expected.load_state_dict({"weight": module.weight})
    module(INDICES)
    expected(INDICES)
    assert torch.equal(module.weight, expected.weight)
    assert module.weight[[0, 1, 2, 4]].norm(dim=1).max() <= 0.5 + 1e-5


@both
def test_sparse_gradient_is_that_of_the_dense_one(cls):
    dense, sparse = cls(5, 4, mode="sum") if cls is QuantEmbeddingBag else cls(5, 4), None
    sparse = cls(5, 4, sparse=True, mode="sum") if cls is QuantEmbeddingBag else cls(5, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    outputs = [module(INDICES) for module in (dense, sparse)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_sparse_gradient_trains_with_a_sparse_optimizer():
    module = calibrated(QuantEmbedding, sparse=True)
    before = module.weight.detach().clone()
    module(INDICES).sum().backward()
    torch.optim.SparseAdam(module.parameters()).step()
    changed = (module.weight != before).any(dim=1)
    assert changed.tolist() == [True, True, True, False, True]


@both
def test_renormalization_is_refused_in_a_file(cls, tmp_path):
    module = calibrated(cls, max_norm=1.0).eval()
    with pytest.raises(
        ExportError, match=r"^Embedding(Bag)?: expected max_norm None, got 1.0: a file holds the rows as they are"
    ):
        fakequant.export_onnx(module, (INDICES,), tmp_path / "module.onnx")


class Net(nn.Module):
    """An embedding, a norm, an activation and a bilinear layer around a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 32)
        self.norm = nn.LayerNorm(32)
        self.fc = nn.Linear(32, 32)
        self.act = nn.GELU()
        self.last = nn.Bilinear(32, 32, 3)

    def forward(self, indices):
        x = self.norm(self.table(indices))
        return self.last(self.act(self.fc(x)), x)


TYPES = ("Embedding", "LayerNorm", "GELU", "Bilinear")
with_and_without = pytest.mark.parametrize("example", [None, (INDICES,)], ids=["no example", "example"])


@with_and_without
def test_they_stay_float_by_default(example):
    model = Net()
    report = fakequant.quantize(model, example_inputs=example)
    assert {layer.type for layer in report.quantized} == {"Linear"}
    assert type(model.table) is nn.Embedding


@with_and_without
@pytest.mark.parametrize("type_name", TYPES)
def test_rule_quantizes_one_type(type_name, example):
    model = Net()
    fakequant.quantize(model, preset("int8") + Rule(type=type_name), example_inputs=example)
    quantized = {type(child).float_class.__name__ for child in model.children() if hasattr(child, "float_class")}
    assert quantized == {"Linear", type_name}


@with_and_without
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_file_of_all_of_them_is_within_a_step(target, example, tmp_path):
    model = Net().eval()
    recipe = preset("int8")
    for type_name in TYPES:
        recipe += Rule(type=type_name)
    fakequant.quantize(model, recipe, example_inputs=example, target=target)
    fakequant.calibrate(model, [INDICES], progress=False)
    fakequant.export_onnx(model, (INDICES,), tmp_path / "net.onnx", target=target)
    assert fakequant.compare(model, tmp_path / "net.onnx", INDICES).first_divergence is None


@pytest.mark.parametrize(("target", "weights"), [("tensorrt", 0), ("onnxruntime", 1)])
@both
def test_file_stores_the_table_as_its_target_wants(cls, target, weights, tmp_path):
    module = calibrated(cls).eval()
    report = fakequant.export_onnx(module, (INDICES,), tmp_path / "table.onnx", target=target)
    assert report.integer_weights == weights
    readers = [node.op_type for node in onnx.load(tmp_path / "table.onnx").graph.node]
    assert "DequantizeLinear" not in readers, "it would dequantize the whole table in each run"
    assert fakequant.compare(module, tmp_path / "table.onnx", INDICES).first_divergence is None
    assert fakequant.inspect_onnx(tmp_path / "table.onnx").float_with_qdq == ()


def test_placement_knows_both_inputs_of_a_bilinear_layer():
    model = nn.ModuleDict({"last": nn.Bilinear(16, 16, 4)})
    model.forward = lambda x, y: model["last"](x, y)
    plan = fakequant.plan(model, (torch.randn(2, 16), torch.randn(2, 16)), recipe=preset("int8") + Rule(type="Bili*"))
    assert {edge.name for edge in plan.report.edges if edge.descriptor} == {"last.input1", "last.input2", "last.weight"}


def test_placement_quantizes_no_indices():
    plan = fakequant.plan(Net(), (INDICES,), recipe=preset("int8") + Rule(type="Embedding", force=True))
    assert [edge.name for edge in plan.report.edges if edge.type == "Embedding"] == ["table.weight"]


def test_bilinear_weight_has_a_range_for_each_output():
    module = QuantBilinear(3, 4, 5)
    batch = torch.randn(2, 3), torch.randn(2, 4)
    fakequant.calibrate(module, [batch], forward=lambda module, batch: module(*batch), progress=False)
    assert module.weight_quantizer.amax.shape == (5, 1, 1)


@pytest.mark.parametrize("example", [None, torch.tensor([[1, 2]])], ids=["no example", "example"])
def test_a_table_that_stays_float_is_reported(example):
    model = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32))
    report = fakequant.quantize(model, example_inputs=example)
    (layer,) = report.left_float
    assert (layer.name, layer.type, layer.reason) == ("0", "Embedding", "stays float unless a rule names its type")
