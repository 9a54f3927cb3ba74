"""Files of the opsets before torch.export's exporter, 13 to 17, for both targets, and what all exports agree on."""

import copy
import gc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant as fq
from fakequant import QuantDescriptor, Recipe, Rule
from fakequant.export.graph import constant_of

OPSETS = [13, 14, 15, 16, 17]
BOTH_EXPORTERS = pytest.mark.parametrize("opset", [17, 18])


class Block(nn.Module):
    """A residual block with a depthwise convolution, normalized over channels, and a mean, [N, 16, 8, 8] to [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.fc, self.act = nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise(F.relu(self.bn(self.conv(x)) + x)))
        return self.act(self.norm(self.fc(y.mean((2, 3)))))


def exported(path, target, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 16, 8, 8)
    fq.quantize(model, example_inputs=x, target=target)
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), path, target=target, **options)
    return model, x


@pytest.fixture(scope="module", params=OPSETS)
def opset(request) -> int:
    return request.param


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def block(request, opset, tmp_path_factory):
    """Return a quantized block, its batch and its file."""
    path = tmp_path_factory.mktemp("block") / "m.onnx"
    return *exported(path, request.param, opset=opset), path


def test_the_file_has_the_opset_that_was_asked_for_and_its_ir_version(block, opset):
    file = onnx.load(block[2])
    assert [(domain.domain, domain.version) for domain in file.opset_import] == [("", opset)]
    # From ONNX's table of versions (docs/Versioning.md).
    assert file.ir_version == {13: 7, 14: 7, 15: 8, 16: 8, 17: 8}[opset]


def test_the_file_computes_what_torch_does(block):
    model, x, path = block
    found = fq.validate_onnx(path, model, [x])
    assert found.simulated.max_steps <= 1
    assert found.simulated.sqnr_db >= 80
    assert found.optimized.max_steps <= 2


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_weights_have_a_channel_axis(tmp_path, weights):
    exported(tmp_path / "m.onnx", "tensorrt", opset=13, weights=weights)
    found = {
        node.metadata_props["fakequant.quantizer"]: node.attributes.get_int("axis", None)
        for node in ir.load(tmp_path / "m.onnx").graph
        if node.op_type == "DequantizeLinear" and constant_of(node.inputs[1]).size > 1
    }
    assert found == {f"{layer}._weight_quantizer": 0 for layer in ("conv", "depthwise", "fc")}


@pytest.mark.parametrize("opset", [13, 17])
def test_onnxruntime_runs_the_block_in_integers(tmp_path, opset, integer_ops):
    exported(tmp_path / "m.onnx", "onnxruntime", opset=opset)
    assert integer_ops(tmp_path / "m.onnx") == {
        "QLinearConv": 2,
        "QLinearAdd": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }


def test_the_parts_of_a_layer_norm_stay_for_onnxruntime_to_fuse(tmp_path, optimized_ops):
    exported(tmp_path / "m.onnx", "onnxruntime", opset=13)
    ops = [node.op_type for node in ir.load(tmp_path / "m.onnx").graph]
    assert "LayerNormalization" not in ops, "it is not in opset 13"
    assert optimized_ops(tmp_path / "m.onnx")["LayerNormalization"] == 1


class Arguments(nn.Module):
    """A forward with every kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, others, factor=2, unused=None, *rest):
        y = self.fc(x) * factor + others[0] + others[1]["Key B"]
        return {"sum": y + sum(rest), "parts": [y, None]}


@BOTH_EXPORTERS
def test_arguments_that_are_no_tensors_are_fixed_and_the_others_named_after_forwards(tmp_path, opset):
    model, x = Arguments().eval(), torch.randn(4, 8)
    fq.quantize(model, fq.Recipe() + fq.Rule(input=fq.QuantDescriptor(amax=3.0), weight=fq.QuantDescriptor(amax=0.5)))
    args = (x, [torch.randn(8), {"Key B": torch.randn(4, 8)}], 3, torch.randn(2), torch.randn(8))
    fq.export_onnx(model, args, tmp_path / "m.onnx", opset=opset)
    session = fq.export.Session(tmp_path / "m.onnx")
    assert list(session.inputs) == ["x", "others_0", "others_1_key_b", "unused", "rest_0"]
    tensors = [args[0], args[1][0], args[1][1]["Key B"], args[3], args[4]]
    got = session.run({name: tensor.numpy() for name, tensor in zip(session.inputs, tensors, strict=True)})
    expected = model(*args)
    for array, tensor in zip(got.values(), (expected["sum"], expected["parts"][0]), strict=True):
        np.testing.assert_allclose(array, tensor.detach().numpy(), atol=1e-5)


@BOTH_EXPORTERS
def test_equal_weights_that_are_not_tied_are_integers(tmp_path, opset):
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    model = nn.Sequential(layer, copy.deepcopy(layer)).eval()
    fq.quantize(model)
    fq.calibrate(model, [x], progress=False)
    report = fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    assert report.float_ops == {}
    assert report.integer_weights in {1, 2}
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.max_steps == 0


@BOTH_EXPORTERS
def test_layers_without_quantizers_stay_as_they_are(tmp_path, opset):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5)).eval(), torch.randn(2, 5, 8)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    (got,) = fq.export.Session(tmp_path / "m.onnx").run({"input": x.numpy()}).values()
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-5)


@BOTH_EXPORTERS
def test_inputs_and_outputs_can_be_named(tmp_path, opset):
    exported(tmp_path / "m.onnx", "tensorrt", opset=opset, input_names=["image"], output_names=["logits"])
    graph = ir.load(tmp_path / "m.onnx").graph
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["image", "logits"]


@BOTH_EXPORTERS
def test_too_many_input_names_are_an_error(tmp_path, opset):
    with pytest.raises(fq.ExportError, match=r"input_names: expected at most 1 \(x\), got 2"):
        exported(tmp_path / "m.onnx", "tensorrt", opset=opset, input_names=["image", "mask"])


@BOTH_EXPORTERS
def test_arguments_that_forward_does_not_take_are_an_error(tmp_path, opset):
    x = torch.zeros(3, 8)
    with pytest.raises(fq.ExportError, match=r"args: expected what Linear\.forward takes, got too many positional"):
        fq.export_onnx(nn.Linear(8, 8), (x, x), tmp_path / "m.onnx", opset=opset)


@pytest.mark.parametrize(("bits", "needed"), [((4, 3), 19), (16, 21), (12, 21)], ids=["fp8", "int16", "int12"])
def test_codes_that_an_opset_has_no_type_for_are_an_error(tmp_path, bits, needed):
    model = nn.Linear(8, 8)
    fq.quantize(model, fq.Recipe() + fq.Rule(input=fq.QuantDescriptor(bits, amax=1.0), weight=None))
    with pytest.raises(fq.ExportError, match=f"opset: expected {needed} or later, got 17, for _input_quantizer"):
        fq.export_onnx(model, (torch.zeros(3, 8),), tmp_path / "m.onnx", target="onnxruntime", opset=17)


@pytest.mark.parametrize("opset", [13, 17])
def test_an_op_that_the_exporter_does_not_know_is_an_error(tmp_path, opset):
    @torch.library.custom_op(f"fakequant_test_opsets::twice{opset}", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    with pytest.raises(
        fq.ExportError,
        match=f"twice{opset}.*Files below opset 18 .* TorchScript exporter, which register_op does not reach",
    ):
        fq.export_onnx(Twice(), (torch.zeros(3),), tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


@BOTH_EXPORTERS
def test_the_weights_are_let_go_of(tmp_path, opset):
    model, _ = exported(tmp_path / "m.onnx", "tensorrt", opset=opset)
    weight = weakref.ref(model.conv.weight)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("learned", ["lsq", "lsq+", "pact"])
def test_a_learned_range_is_exported_below_opset_18_like_any_other(tmp_path, learned):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    weight = QuantDescriptor(4, axis=0, learn_amax="lsq")
    grid = QuantDescriptor(4, affine=learned == "lsq+", learn_amax=learned)
    fq.quantize(model, Recipe((Rule(type="Linear", input=grid, weight=weight),)))
    fq.calibrate(model, [x], progress=False)
    names = [name for name, _ in model.named_parameters()]
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime", opset=13)
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.max_steps <= 1
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
