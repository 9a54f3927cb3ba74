"""validate_onnx catches a wrong file, and says clearly what it cannot do."""

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fakequant as fq
from fakequant.export import Session
from fakequant.export.graph import constant_of, new_initializer

needs_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
)


@pytest.fixture(scope="module")
def report(cnn):
    return fq.validate_onnx(cnn.path, cnn.model, [cnn.args[0], (cnn.args[0].flip(3), torch.zeros(4))])


def test_a_right_file_is_within_the_promise(report):
    assert report.simulated.max_steps <= 1
    assert report.simulated.sqnr_db >= 50
    assert report.optimized.max_steps <= 2


def test_the_classes_agree(report):
    assert report.simulated.top1_agreement == 1.0


def test_all_batches_are_counted(report):
    assert (report.num_batches, report.provider, report.quantized_ops) == (2, "cpu", 5)


def test_the_report_is_four_lines(report, cnn):
    lines = str(report).splitlines()
    assert lines[0] == f"{cnn.path} on cpu, 2 batches, against torch:"
    assert "steps at most at a quantizer given equal inputs" in lines[1]
    assert lines[3].endswith("of 5 quantized ops ran as integer kernels")


def test_validation_leaves_the_model(cnn):
    cnn.model.train()
    cnn.validate(num_batches=1)
    assert cnn.model.training
    assert all(not module._forward_hooks for module in cnn.model.modules())
    cnn.model.eval()


def scaled(name: str, factor: float) -> Callable[[ir.Graph], None]:
    def change(graph: ir.Graph) -> None:
        scale = graph.initializers[f"{name}.scale"]
        scale.const_value = ir.tensor(constant_of(scale) * np.float32(factor), name=scale.name)

    return change


def _reread_along_axis_1(graph: ir.Graph) -> None:
    (node,) = [n for n in graph if n.name == "grouped._weight_quantizer.DequantizeLinear"]
    codes = constant_of(node.inputs[0]).reshape(8, -1)
    assert codes.shape == (8, 36)
    wrong = np.ascontiguousarray(np.roll(codes, 1, axis=0)).reshape(8, 4, 3, 3)
    node.replace_input_with(0, new_initializer(graph, "wrong", wrong))


def _swap(graph: ir.Graph) -> None:
    first, second = (
        next(n for n in graph if n.name == f"{layer}._weight_quantizer.DequantizeLinear")
        for layer in ("stem", "grouped")
    )
    scale = constant_of(first.inputs[1])
    first.replace_input_with(1, new_initializer(graph, "swapped_1", constant_of(second.inputs[1])))
    second.replace_input_with(1, new_initializer(graph, "swapped_2", scale))


WRONG = [
    pytest.param(scaled("depthwise._input_quantizer", 1.1), "depthwise._input_quantizer", id="activation-scale"),
    pytest.param(scaled("up._weight_quantizer", 1.5), "fc._input_quantizer", id="weight-scale"),
    pytest.param(_reread_along_axis_1, "depthwise._input_quantizer", id="weight-rows"),
    pytest.param(_swap, "grouped._input_quantizer", id="swapped-scales"),
]


@pytest.mark.parametrize(("change", "worst"), WRONG)
def test_a_wrong_file_is_caught_and_located(tmp_path, cnn, change, worst):
    model = ir.load(cnn.path)
    change(model.graph)
    ir.save(model, tmp_path / "wrong.onnx")
    report = fq.validate_onnx(tmp_path / "wrong.onnx", cnn.model, cnn.args)
    assert report.simulated.max_steps > 1
    assert report.simulated.worst_quantizer == worst
    assert report.simulated.sqnr_db < 50


def test_a_wrong_axis_is_caught(tmp_path, quantized):
    model = quantized(nn.Sequential(nn.Conv2d(4, 4, 4), nn.Flatten(), nn.Linear(16, 2)), torch.randn(8, 4, 5, 5))
    x = torch.randn(8, 4, 5, 5)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    file = ir.load(tmp_path / "m.onnx")
    (node,) = [n for n in file.graph if n.name == "0._weight_quantizer.DequantizeLinear"]
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    ir.save(file, tmp_path / "m.onnx")
    comparison = fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated
    assert comparison.max_steps > 1
    assert comparison.worst_quantizer == "2._input_quantizer"


def test_a_wrong_last_layer_is_caught_end_to_end(tmp_path, cnn):
    model = ir.load(cnn.path)
    scaled("fc._weight_quantizer", 1.05)(model.graph)
    ir.save(model, tmp_path / "wrong.onnx")
    comparison = fq.validate_onnx(tmp_path / "wrong.onnx", cnn.model, cnn.args).simulated
    assert comparison.max_steps <= 1, "nothing is quantized behind it"
    assert comparison.sqnr_db < 50


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there")
def test_a_missing_provider_says_what_to_install(cnn):
    with pytest.raises(fq.ValidationError, match=r"provider 'cuda'.*Run: pip install onnxruntime-gpu"):
        cnn.validate(provider="cuda")


@needs_cuda
@pytest.mark.gpu
def test_cuda_computes_the_same(cnn):
    report = cnn.validate(provider="cuda")
    assert report.simulated.max_steps <= 1
    assert report.simulated.sqnr_db >= 50


def test_an_unknown_provider(cnn):
    with pytest.raises(fq.InvalidValueError, match=r"provider: expected one of \['cpu', 'cuda'.*\], got 'tpu'"):
        cnn.validate(provider="tpu")


def test_a_missing_file(tmp_path, cnn):
    with pytest.raises(fq.ValidationError, match=r"none\.onnx: expected an ONNX file, got nothing there"):
        fq.validate_onnx(tmp_path / "none.onnx", cnn.model, cnn.args)


def test_a_file_that_is_no_onnx(tmp_path, cnn):
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(fq.ValidationError, match=r"text\.onnx: expected an ONNX file, got something else"):
        fq.validate_onnx(tmp_path / "text.onnx", cnn.model, cnn.args)


def test_a_wrong_batch_size(cnn):
    with pytest.raises(
        fq.ValidationError, match=r"expected inputs \{'x': \[4, 3, 8, 8\]\}, got \{'x': \(2, 3, 8, 8\)\}"
    ):
        fq.validate_onnx(cnn.path, cnn.model, [cnn.args[0][:2]])


def test_no_data(cnn):
    with pytest.raises(fq.ValidationError, match="data: expected at least one batch, got none"):
        fq.validate_onnx(cnn.path, cnn.model, [])


def test_another_model(cnn):
    with pytest.raises(
        fq.ValidationError, match=r"expected quantizers that the model has, got stem\._input.* Is this the model"
    ):
        fq.validate_onnx(cnn.path, nn.Flatten(), cnn.args)


def test_a_model_with_other_outputs(tmp_path, quantized):
    x = torch.randn(3, 4)
    fq.export_onnx(quantized(nn.Linear(4, 2), x), (x,), tmp_path / "m.onnx")
    with pytest.raises(
        fq.ValidationError, match=r"expected outputs of shapes \[\(3, 5\)\] as in torch, got \[\(3, 2\)\]"
    ):
        fq.validate_onnx(tmp_path / "m.onnx", quantized(nn.Linear(4, 5), x), [x])


@pytest.mark.parametrize("spoil", ["uncalibrated", "disabled"])
def test_a_model_that_is_not_as_it_was_exported(tmp_path, quantized, spoil):
    x = torch.randn(3, 4)
    model = quantized(nn.Linear(4, 2), x)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    if spoil == "disabled":
        model.input_quantizer.disable()
    else:
        model.input_quantizer.amax = None
    with pytest.raises(fq.ValidationError, match="_input_quantizer: expected it calibrated and enabled as in the file"):
        fq.validate_onnx(tmp_path / "m.onnx", model, [x])


def test_a_model_with_other_ranges_is_caught(tmp_path, quantized):
    x = torch.randn(3, 4)
    model = quantized(nn.Linear(4, 2), x)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    model.input_quantizer.amax = 2 * model.input_quantizer.amax
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.max_steps > 1


class TwoInputs(nn.Module):
    """Two tensors in, a tensor and a list out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, object]:
        out = self.layer(image)
        return {"logits": out * mask, "features": [out, image.sum()]}


@pytest.fixture(scope="module")
def two_inputs(tmp_path_factory):
    model, args = TwoInputs().eval(), (torch.randn(3, 4), torch.rand(3, 4))
    fq.quantize(model)
    fq.calibrate(model, [{"image": args[0], "mask": args[1]}], progress=False)
    path = tmp_path_factory.mktemp("two") / "m.onnx"
    fq.export_onnx(model, args, path)
    return path, model, args


def test_dict_batches_and_several_outputs(two_inputs):
    path, model, (image, mask) = two_inputs
    report = fq.validate_onnx(path, model, [{"mask": mask, "image": image}])
    assert report.simulated.max_steps == 0
    assert report.simulated.sqnr_db >= 110


def test_other_batches_with_inputs(two_inputs):
    path, model, args = two_inputs
    report = fq.validate_onnx(path, model, [{"data": args}], inputs=lambda batch: batch["data"])
    assert report.simulated.sqnr_db >= 110


def test_other_batches_without_inputs(two_inputs):
    path, model, args = two_inputs
    with pytest.raises(fq.InvalidTypeError, match=r"Pass inputs=lambda batch: \(\.\.\.\)"):
        fq.validate_onnx(path, model, [(*args, 1)])


class ScaledByItsMean(nn.Module):
    """A quantizer on a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = fq.TensorQuantizer(fq.QuantDescriptor(amax=1.0))

    def forward(self, x):
        return x * self.quantizer(x.mean())


def test_a_quantized_scalar(tmp_path):
    model, x = ScaledByItsMean(), torch.rand(2, 3)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.max_steps == 0


def test_num_batches_stops_early(cnn):
    def endless():
        while True:
            yield cnn.args[0]

    assert fq.validate_onnx(cnn.path, cnn.model, endless(), num_batches=2).num_batches == 2


def test_a_float_model_has_no_steps(tmp_path):
    x = torch.randn(3, 4)
    model = nn.Linear(4, 2)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    comparison = fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated
    assert comparison.max_steps is None
    assert comparison.sqnr_db >= 110
    assert "steps" not in str(comparison)


def test_equal_outputs_have_infinite_sqnr():
    comparison = fq.export.Comparison()
    comparison.add_outputs([np.ones((2, 3))], [np.ones((2, 3), dtype=np.float32)])
    assert (comparison.sqnr_db, comparison.max_error) == (math.inf, 0.0)


def test_sqnr_is_signal_to_difference():
    comparison = fq.export.Comparison()
    comparison.add_outputs([np.full(100, 10.0, dtype=np.float32)], [np.full(100, 10.1)])
    assert comparison.sqnr_db == pytest.approx(40.0, abs=1e-3)


def test_steps_name_the_worst():
    comparison = fq.export.Comparison()
    comparison.add_codes("a", np.array([1, 2], dtype=np.int8), np.array([1, 3], dtype=np.int8))
    comparison.add_codes("b", np.array([-128, 0], dtype=np.int8), np.array([127, 0], dtype=np.int8))
    assert (comparison.max_steps, comparison.worst_quantizer, comparison.moved) == (255, "b", 0.5)


INTEGER = """
<ir_version: 10, opset_import: ["" : 19]>
agraph (float[1, 4, 6, 6] x) => (float[1, 8, 4, 4] y)
<float s = {0.02}, uint8 z = {128}, float t = {0.03}, float[8] ws = {0.01, 0.01, 0.01, 0.01, 0.02, 0.02, 0.02, 0.02},
 int8[8] wz = {0, 0, 0, 0, 0, 0, 0, 0}, int8[8, 4, 3, 3] w, float[8] b = {0, 0, 0, 0, 0, 0, 0, 0}>
{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    dw = DequantizeLinear<axis = 0>(w, ws, wz)
    c = Conv<kernel_shape = [3, 3]>(d, dw, b)
    q2 = QuantizeLinear(c, t, z)
    y = DequantizeLinear(q2, t, z)
}
"""


@pytest.fixture(scope="module")
def integer_file(tmp_path_factory):
    codes = np.random.default_rng(0).integers(-127, 128, 8 * 4 * 9)
    values = "{" + ", ".join(map(str, codes)) + "}"
    path = tmp_path_factory.mktemp("integer") / "m.onnx"
    onnx.save(onnx.parser.parse_model(INTEGER.replace("3, 3] w", f"3, 3] w = {values}")), path)
    return path


@pytest.mark.parametrize(("optimized", "count"), [(True, 1), (False, 0)], ids=["optimized", "as-written"])
def test_integer_kernels_are_counted(integer_file, optimized, count):
    session = Session(integer_file, optimized=optimized)
    assert session.integer_ops == count
    assert session.op_counts.get("QLinearConv", 0) == count


def test_a_session_knows_its_inputs_and_outputs(integer_file):
    session = Session(integer_file, num_threads=1)
    assert (session.inputs, session.outputs) == ({"x": [1, 4, 6, 6]}, ["y"])


def test_integer_kernels_compute_the_same(integer_file):
    x = {"x": np.random.default_rng(1).standard_normal((1, 4, 6, 6), dtype=np.float32)}
    as_written, integer = (Session(integer_file, optimized=o).run(x)["y"] for o in (False, True))
    assert np.abs(np.rint((as_written - integer) / 0.03)).max() <= 1


def test_an_fp8_file_for_tensorrt_is_not_fused_into_something_else(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    fq.quantize(model, "fp8", target="tensorrt")
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="tensorrt")
    found = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert min(found.simulated.sqnr_db, found.optimized.sqnr_db) > 100
