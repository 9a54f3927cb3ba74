"""The exported file computes what the torch model computes, and stores what the torch model has."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export.graph import constant_of

pytestmark = pytest.mark.slow

ALL = fq.Recipe() + fq.Rule()
D = fq.QuantDescriptor


def case(name: str, model: nn.Module, *shape: int):
    return pytest.param(model, shape, id=name)


LAYERS = [
    case("conv1d-grouped", nn.Conv1d(4, 8, 3, groups=2), 2, 4, 9),
    case("conv2d", nn.Conv2d(3, 8, (3, 5), stride=(2, 1), dilation=2, padding=(4, 2)), 2, 3, 12, 12),
    case("conv2d-no-bias", nn.Conv2d(3, 8, 1, bias=False), 2, 3, 6, 6),
    case("conv2d-depthwise", nn.Conv2d(6, 12, 3, groups=6), 2, 6, 8, 8),
    case("conv2d-same", nn.Conv2d(3, 4, 3, padding="same"), 2, 3, 8, 8),
    case("conv2d-reflect", nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 2, 3, 8, 8),
    case("conv2d-replicate", nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), 2, 3, 8, 8),
    case("conv2d-circular", nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 2, 3, 8, 8),
    case("conv2d-unbatched", nn.Conv2d(3, 4, 3), 3, 8, 8),
    case("conv3d-grouped", nn.Conv3d(4, 8, 3, groups=4), 2, 4, 5, 5, 5),
    case("conv_transpose1d", nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 2, 4, 5),
    case("conv_transpose2d-grouped", nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), 2, 4, 5, 5),
    case("conv_transpose3d", nn.ConvTranspose3d(4, 6, 2, stride=2), 2, 4, 3, 3, 3),
    case("linear-rank1", nn.Linear(4, 6), 4),
    case("linear-rank2", nn.Linear(4, 6), 3, 4),
    case("linear-rank2-no-bias", nn.Linear(4, 6, bias=False), 3, 4),
    case("linear-rank3", nn.Linear(4, 6), 2, 5, 4),
    case("linear-wide", nn.Linear(2, 9000), 2, 2),
    case("max_pool2d", nn.MaxPool2d(2), 2, 3, 8, 8),
    case("avg_pool1d", nn.AvgPool1d(2), 2, 3, 8),
    case("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d(1), 2, 3, 4, 4),
    case("instance_norm2d", nn.InstanceNorm2d(3, affine=True), 2, 3, 8, 8),
]


@pytest.mark.parametrize(("model", "shape"), LAYERS)
def test_a_layer_computes_the_same(export, model, shape):
    exported = export(model, torch.randn(shape), recipe=ALL)
    report = exported.validate()
    assert report.simulated.max_steps == 0
    assert report.simulated.sqnr_db >= 110
    assert report.optimized.max_steps <= 1
    assert exported.report.not_in_file == ()


@pytest.mark.parametrize("preset", ["int8", "w4a8"])
def test_a_residual_cnn_computes_the_same(tmp_path, fresh_cnn, preset):
    model, x = fresh_cnn
    fq.dequantize(model)
    fq.quantize(model, preset)
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    report = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert report.simulated.max_steps <= 1
    assert report.simulated.sqnr_db >= 50
    assert report.simulated.top1_agreement == 1.0


def test_the_outputs_are_torchs(cnn):
    (got,) = cnn.run()
    expected = cnn.model(*cnn.args).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_the_onnx_checker_accepts_the_file(cnn):
    onnx.checker.check_model(cnn.path, full_check=True)


def codes_of(layer: nn.Module, axis: int, low: int) -> np.ndarray:
    """Return the codes of a layer's weight, in NumPy, from torch's weight and amax."""
    weight = layer.weight.detach().numpy()
    shape = [1] * weight.ndim
    shape[axis] = -1
    high = 7 if low > -9 else 127
    amax = layer.weight_quantizer.amax.numpy().reshape(shape)
    return np.clip(np.rint(weight / (amax / np.float32(high))), low, high).astype(np.int8)


AXES = [
    pytest.param(nn.Conv1d(4, 6, 3, groups=2), (1, 4, 5), 0, 0, id="conv1d"),
    pytest.param(nn.Conv2d(4, 4, 4), (1, 4, 5, 5), 0, 0, id="conv2d-square"),
    pytest.param(nn.Conv3d(2, 4, 2), (1, 2, 3, 3, 3), 0, 0, id="conv3d"),
    pytest.param(nn.ConvTranspose2d(4, 4, 2), (1, 4, 3, 3), 1, 1, id="conv_transpose2d-square"),
    pytest.param(nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 3, 3), 1, 1, id="conv_transpose2d-grouped"),
    pytest.param(nn.Linear(4, 4), (3, 4), 0, 0, id="linear-rank2-square"),
    pytest.param(nn.Linear(4, 4), (2, 3, 4), 0, 1, id="linear-rank3-square"),
]


@pytest.mark.parametrize(("layer", "shape", "torch_axis", "file_axis"), AXES)
def test_the_stored_codes_are_numpys(export, layer, shape, torch_axis, file_axis):
    exported = export(layer, torch.randn(shape))
    codes, scale, axis = exported.weight()
    expected = codes_of(layer, torch_axis, -127)
    assert axis == file_axis
    np.testing.assert_array_equal(codes, expected if torch_axis == file_axis else expected.T)
    np.testing.assert_array_equal(scale, layer.weight_quantizer.amax.numpy().ravel() / np.float32(127))


@pytest.mark.parametrize(
    ("bits", "narrow", "low", "high"),
    [(8, True, -127, 127), (8, False, -128, 127), (4, True, -7, 7), (4, False, -8, 7)],
    ids=["8-narrow", "8", "4-narrow", "4"],
)
@pytest.mark.parametrize("channels", [8, 2000], ids=["small", "large"])
def test_clipped_weights_stop_at_the_bounds(tmp_path, quantized, bits, narrow, low, high, channels):
    weight = D(bits, axis=0, narrow_range=narrow)
    layer = quantized(nn.Linear(8, channels), torch.randn(2, 8), recipe=fq.Recipe() + fq.Rule(weight=weight))
    layer.weight_quantizer.amax = layer.weight_quantizer.amax / 2
    fq.export_onnx(layer, (torch.randn(2, 8),), tmp_path / "m.onnx")
    (node,) = [n for n in ir.load(tmp_path / "m.onnx").graph if "_weight_quantizer" in n.name]
    codes = constant_of(node.inputs[0])
    assert (codes.min(), codes.max()) == (low, high)
    np.testing.assert_array_equal(codes, np.clip(codes_of(layer, 0, low), low, high))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_an_int32_bias_is_no_integer_weight(tmp_path, quantized, target):
    layer, x = quantized(nn.Linear(8, 4), torch.randn(2, 8)), torch.randn(2, 8)
    assert fq.export_onnx(layer, (x,), tmp_path / "m.onnx", target=target).integer_weights == 1


def test_weights_are_stored_once_as_int8_with_dq_only(cnn):
    weights = ["stem", "grouped", "depthwise", "up", "fc"]
    assert cnn.report.integer_weights == len(weights)
    assert not [n for n in cnn.nodes("QuantizeLinear") if "_weight_quantizer" in n.name]
    floats = [v for v in cnn.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) > 1]
    assert floats == []
    integers = [v for v in cnn.graph.initializers.values() if v.dtype == ir.DataType.INT8 and len(v.shape) > 1]
    assert len(integers) == len(weights)


def test_int8_weights_are_raw_data(cnn):
    for tensor in onnx.load(cnn.path).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            assert len(tensor.raw_data) == np.prod(tensor.dims)
            assert not tensor.int32_data


def test_float_weights_have_q_and_dq(float_cnn):
    pairs = [n for n in float_cnn.nodes("DequantizeLinear") if "_weight_quantizer" in n.name]
    assert len(pairs) == 5
    for node in pairs:
        assert node.inputs[0].producer().op_type == "QuantizeLinear"
        assert constant_of(node.inputs[0].producer().inputs[0]).dtype == np.float32


def test_float_weights_give_the_same_bits(cnn, float_cnn):
    np.testing.assert_array_equal(cnn.run()[0], float_cnn.run(*cnn.args)[0])


@pytest.mark.parametrize(("layer", "norm"), [("stem", "bn1"), ("grouped", "bn2"), ("depthwise", "bn3"), ("up", "bn4")])
def test_batchnorm_is_folded_into_the_codes_signs(cnn, layer, norm):
    conv, bn = getattr(cnn.model, layer), getattr(cnn.model, norm)
    axis = 1 if layer == "up" else 0
    codes, scale, _ = cnn.weight(layer)
    sign = torch.sign(bn.weight).detach().numpy().reshape([-1 if i == axis else 1 for i in range(4)])
    np.testing.assert_array_equal(codes, codes_of(conv, axis, -127) * sign.astype(np.int8))
    factor = bn.weight.detach().double().abs() / (bn.running_var.double() + bn.eps).sqrt()
    expected = (conv.weight_quantizer.scale.double().flatten() * factor).numpy()
    np.testing.assert_allclose(scale[1:], expected[1:], rtol=1e-6)
    assert scale[0] == 2.0**-14, "gamma 0"


def test_every_batchnorm_is_folded(cnn):
    assert (cnn.report.folded_batchnorms, cnn.report.kept_batchnorms) == (4, {})
    assert cnn.nodes("BatchNormalization") == []


def test_zero_points_are_typed_and_zero(cnn):
    for node in [*cnn.nodes("QuantizeLinear"), *cnn.nodes("DequantizeLinear")]:
        zero_point = constant_of(node.inputs[2])
        assert zero_point.dtype == np.int8
        assert zero_point.shape == constant_of(node.inputs[1]).shape
        assert not zero_point.any()


def test_per_tensor_nodes_have_scalar_scales(cnn):
    for node in cnn.nodes("QuantizeLinear"):
        assert constant_of(node.inputs[1]).shape == ()


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_convolutions_have_a_kernel_shape(cnn, op_type):
    for node in cnn.nodes(op_type):
        assert tuple(node.attributes.get_ints("kernel_shape")) == tuple(node.inputs[1].shape[2:])


@pytest.mark.parametrize("secret", [b"/work", b"/tmp", b"site-packages", b"pkg.", b".py"])
@pytest.mark.parametrize("file", ["cnn", "float_cnn"])
def test_the_file_names_nothing_of_this_machine(request, file, secret):
    assert secret not in request.getfixturevalue(file).path.read_bytes()


def test_nodes_carry_the_names_of_quantizers(cnn):
    found = {node.metadata_props["fakequant.quantizer"] for node in cnn.nodes("DequantizeLinear")}
    assert found == {name for name, module in cnn.model.named_modules() if isinstance(module, fq.TensorQuantizer)}


def test_nodes_carry_the_names_of_modules(cnn):
    assert [n.metadata_props["fakequant.module"] for n in cnn.nodes("Conv")] == ["stem", "grouped", "depthwise"]


def test_the_report_says_what_the_file_holds(cnn):
    assert len(cnn.report.quantizers) == 10
    assert cnn.report.float_ops == {}
    assert cnn.report.size == cnn.path.stat().st_size
    assert str(cnn.report).endswith("10 quantizers, 5 integer weights, 4 BatchNorms folded")


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10)])
def test_opset_and_ir_version(export, opset, ir_version):
    exported = export(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5), opset=opset)
    model = onnx.load(exported.path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert (model.ir_version, exported.report.opset) == (ir_version, opset)
    assert exported.validate().simulated.max_steps == 0


def test_the_default_opset_is_19(cnn):
    assert onnx.load(cnn.path).opset_import[0].version == 19


@pytest.mark.parametrize("size", [1, 5])
def test_a_dynamic_batch_takes_any_size(export, size):
    exported = export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)),
        torch.randn(2, 3, 5, 5),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    x = torch.randn(size, 3, 5, 5)
    np.testing.assert_allclose(exported.run(x)[0], exported.model(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(4, 2), (3, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (1, 3, 2, 2)),
        (nn.Sequential(nn.Linear(4, 2), fq.TensorQuantizer(D(amax=1.0))), (3, 4)),
    ],
    ids=["linear", "folded-batchnorm", "quantizer"],
)
def test_inputs_and_outputs_are_named(export, model, shape):
    exported = export(model, torch.randn(shape), input_names=["image"], output_names=["logits"])
    assert [v.name for v in exported.graph.inputs] == ["image"]
    assert [v.name for v in exported.graph.outputs] == ["logits"]


@pytest.mark.parametrize(
    ("descriptor", "opset", "dtype"),
    [
        pytest.param(D(8, unsigned=True), 19, ir.DataType.UINT8, id="uint8"),
        pytest.param(D(4), 19, ir.DataType.INT8, id="int4-in-int8"),
        pytest.param(D(5, unsigned=True), 19, ir.DataType.UINT8, id="uint5-in-uint8"),
        pytest.param(D(16), 21, ir.DataType.INT16, id="int16"),
        pytest.param(D(12, unsigned=True), 21, ir.DataType.UINT16, id="uint12-in-uint16"),
    ],
)
def test_activations_of_other_widths(export, descriptor, opset, dtype):
    recipe = fq.Recipe() + fq.Rule(input=descriptor.replace(amax=1.5))
    exported = export(nn.Linear(4, 6), torch.rand(50, 4) * 2, recipe=recipe, opset=opset, target="onnxruntime-cuda")
    assert exported.quantizer("_input_quantizer", "QuantizeLinear").outputs[0].dtype == dtype
    assert exported.validate().simulated.max_steps == 0
    assert exported.validate().simulated.sqnr_db >= 110


def test_a_narrow_activation_is_off_by_one_step_at_most(export):
    recipe = fq.Recipe() + fq.Rule(input=D(8, narrow_range=True, amax=0.5))
    assert export(nn.Linear(4, 6), torch.randn(50, 4), recipe=recipe).validate().simulated.max_steps == 1


@pytest.mark.parametrize(
    ("model", "shape"), [(nn.Conv2d(3, 4, 3), (2, 3, 6, 6)), (nn.Linear(3, 4), (2, 3))], ids=["conv2d", "linear"]
)
def test_fp8_is_a_float8_pair_and_a_stored_weight(export, model, shape):
    fp8 = D((4, 3))
    exported = export(model, torch.randn(shape), recipe=fq.Recipe() + fq.Rule(input=fp8, weight=fp8.replace(axis=0)))
    assert [n.outputs[0].dtype for n in exported.nodes("QuantizeLinear")] == [ir.DataType.FLOAT8E4M3FN]
    assert [n.inputs[0].dtype for n in exported.nodes("DequantizeLinear")] == [ir.DataType.FLOAT8E4M3FN] * 2
    np.testing.assert_allclose(exported.run()[0], model(*exported.args).detach().numpy(), atol=1e-5)
