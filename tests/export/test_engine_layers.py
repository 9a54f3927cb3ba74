"""What the engine inspector of TensorRT 8 to 11 says, read."""

import json

import pytest

from fakequant.export.engine_layers import EngineLayer, read_layers

INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"

# The form of the developer guide's example (Engine Inspector), with what trex and polygraphy read.
CONVOLUTION = {
    "Name": "layer1.0.conv1 + layer1.0.relu",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [16, 512, 28, 28], "Format/Datatype": INT8}],
    "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [16, 256, 28, 28], "Format/Datatype": HALF}],
    "ParameterType": "Convolution",
    "Weights": {"Type": "Int8", "Count": 131072},
    "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: layer1.0.conv1]\u001e[ONNX Layer: layer1.0.relu]",
}
# TensorRT 11: the type in a field of its own ("Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
PRODUCT = {
    "Name": "fc_myl0_3",
    "LayerType": "gemm",
    "Inputs": [{"Name": "a", "Dimensions": [4, 32], "Format": "Row major linear format", "DataType": "Int8"}],
    "Outputs": [{"Name": "b", "Dimensions": [4, 16], "Format": "Row major linear format", "DataType": "Float"}],
    "Metadata": "[ONNX Layer: fc]",
}
COPY = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to layer1.0.conv1 + layer1.0.relu",
    "LayerType": "Reformat",
    "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
    "Outputs": [{"Name": "x'", "Format/Datatype": INT8}],
    "Metadata": "",
}


def read(*layers, milliseconds=None) -> tuple[EngineLayer, ...]:
    return read_layers(json.dumps({"Layers": layers, "Bindings": ["x", "y"]}), milliseconds or {})


def test_a_convolution():
    (layer,) = read(CONVOLUTION, milliseconds={CONVOLUTION["Name"]: 0.125})
    nodes = ("layer1.0.conv1", "layer1.0.relu")
    assert layer == EngineLayer(CONVOLUTION["Name"], "CaskConvolution", "int8", "fp16", nodes, 0.125)
    assert str(layer) == "  0.125 ms  int8 to fp16   CaskConvolution  layer1.0.conv1 + layer1.0.relu"


def test_a_product_of_tensorrt_11():
    (layer,) = read(PRODUCT)
    assert (layer.precision, layer.output, layer.nodes) == ("int8", "fp32", ("fc",))


def test_a_layer_that_the_profiler_did_not_name():
    assert read(PRODUCT)[0].milliseconds is None
    assert str(read(PRODUCT)[0]).startswith("      ? ms  ")


def test_a_copy_computes_no_node():
    assert read(COPY)[0].nodes == ()


def test_before_tensorrt_8_6_the_name_has_the_nodes():
    old = {key: value for key, value in CONVOLUTION.items() if key != "Metadata"}
    assert read(old)[0].nodes == ("layer1.0.conv1", "layer1.0.relu")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major INT8 format where channel == 4 and column stride % 32 == 0", "int8"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major linear BOOL", "bool"),
        ("Row major linear FP8 format", "fp8"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Int64", "int64"),
        ("BF16", "bf16"),
        ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
    ],
)
@pytest.mark.parametrize("field", ["Format/Datatype", "DataType", "Datatype"])
def test_the_words_for_types(written, expected, field):
    assert read({"Name": "a", "LayerType": "kgen", "Inputs": [{field: written}]})[0].precision == expected


def test_a_constant_has_no_precision():
    layer = read({"Name": "c", "LayerType": "Constant", "Inputs": [], "Outputs": [{"Format/Datatype": "Int8"}]})[0]
    assert (layer.precision, layer.output) == ("", "int8")


def test_an_engine_built_without_details_tells_no_layer():
    assert read("layer1.0.conv1", "fc") == ()
