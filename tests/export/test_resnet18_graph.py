"""ResNet-18 for TensorRT: which edges of the file carry Q/DQ, by name (rules R30 to R38)."""

import onnx_ir as ir
import pytest
import torch

import fakequant as fq
from fakequant.export.graph import MODULE_KEY, QUANTIZER_KEY, constant_of, produced_by

pytestmark = pytest.mark.slow

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
DOWNSAMPLED = [f"layer{stage}.0" for stage in (2, 3, 4)]


@pytest.fixture(scope="module")
def graph(torchvision_models, tmp_path_factory) -> ir.Graph:
    torch.manual_seed(0)
    model, x = torchvision_models.resnet18(weights=None).eval(), torch.rand(2, 3, 64, 64)
    fq.quantize(model, example_inputs=(x,))
    fq.calibrate(model, [x], progress=False)
    path = tmp_path_factory.mktemp("resnet18") / "m.onnx"
    fq.export_onnx(model, (x,), path)
    return ir.load(path).graph


def module_of(node: ir.Node) -> str:
    return node.metadata_props[MODULE_KEY]


def nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def test_every_layer_reads_q_and_dq_on_both_sides(graph):
    layers = nodes(graph, "Conv") + nodes(graph, "Gemm")
    assert len(layers) == 21
    for node in layers:
        assert all(produced_by(value, "DequantizeLinear") for value in node.inputs[:2])
        weight = node.inputs[1].producer().metadata_props[QUANTIZER_KEY]
        assert weight == f"{module_of(node)}._weight_quantizer"


def test_the_weights_are_int8_with_a_scale_a_channel(graph):
    for node in nodes(graph, "Conv"):
        dequantize = node.inputs[1].producer()
        codes, scale = constant_of(dequantize.inputs[0]), constant_of(dequantize.inputs[1])
        assert (codes.dtype.name, scale.shape) == ("int8", (codes.shape[0],))
        assert dequantize.attributes.get_int("axis") == 0


def readers_of(quantize: ir.Node) -> set[str]:
    return {module_of(op) for reader in quantize.outputs[0].consumers() for op in reader.outputs[0].consumers()}


def test_the_edges_that_carry_a_q(graph):
    expected = {"conv1._input_quantizer": {"conv1"}, "avgpool._input_quantizer": {"avgpool"}}
    expected["fc._input_quantizer"] = {"fc"}
    for block in BLOCKS:
        # The input of the first block is a max pool's output: its range is the pool's, which it shares.
        name = "maxpool._input_quantizer" if block == "layer1.0" else f"{block}.conv1._input_quantizer"
        add = f"{block}._call_sites.add_0"
        expected[f"{block}.conv2._input_quantizer"] = {f"{block}.conv2"}
        if block in DOWNSAMPLED:
            expected[name] = {f"{block}.conv1", f"{block}.downsample.0"}
            expected[f"{add}.other"] = {add}
        else:
            expected[name] = {f"{block}.conv1", add}
    found = {node.metadata_props[QUANTIZER_KEY]: readers_of(node) for node in nodes(graph, "QuantizeLinear")}
    assert found == expected


def test_an_add_reads_the_convolution_bare_and_the_skip_quantized(graph):
    adds = nodes(graph, "Add")
    assert len(adds) == 8
    for node in adds:
        assert [value.producer().op_type for value in node.inputs] == ["Conv", "DequantizeLinear"]


def test_nothing_stands_between_a_convolution_and_its_relu_or_add(graph):
    for node in nodes(graph, "Conv"):
        readers = {reader.op_type for reader in node.outputs[0].consumers()}
        downsamples = ".downsample." in module_of(node)
        assert readers == ({"QuantizeLinear"} if downsamples else readers & {"Relu", "Add"})
        assert len(readers) == 1


def test_one_q_and_one_dq_serve_all_readers(graph):
    for node in nodes(graph, "QuantizeLinear"):
        assert [reader.op_type for reader in node.outputs[0].consumers()] == ["DequantizeLinear"]
        others = [reader for reader in node.inputs[0].consumers() if reader.op_type == "QuantizeLinear"]
        assert others == [node]


def test_no_batchnorm_is_left(graph):
    assert not nodes(graph, "BatchNormalization")
