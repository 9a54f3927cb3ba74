"""A grid that a target's files cannot hold is refused, with what to use instead."""

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export.targets.accepts import Use, check_accepted

D = fq.QuantDescriptor
WEIGHT = D(8, axis=0, narrow_range=True, dynamic=True)
TENSORRT = ("tensorrt", "tensorrt-ep")
NVIDIA = (*TENSORRT, "onnxruntime-cuda")
ALL = (*NVIDIA, "onnxruntime")

REFUSED = [
    pytest.param(D(8, unsigned=True, affine=True, dynamic=True), WEIGHT, NVIDIA, "target 'onnxruntime'", id="dynamic"),
    pytest.param(D(8, axis="tokens", dynamic=True), WEIGHT, NVIDIA, "target 'onnxruntime'", id="tokens"),
    pytest.param(D(8, affine=True, unsigned=True), WEIGHT, TENSORRT, "affine=False", id="affine"),
    pytest.param(None, D(8, affine=True, axis=0, dynamic=True), TENSORRT, "affine=False", id="affine-weight"),
    pytest.param(D((5, 2)), WEIGHT, TENSORRT, "FP8 E4M3", id="e5m2"),
    pytest.param(D(16), WEIGHT, TENSORRT, "8 bits", id="16-bits"),
    pytest.param(None, D(8, scheme="dorefa"), TENSORRT, "8 bits", id="dorefa-8"),
    pytest.param(None, D(4, block_size=32, block_axis=1, dynamic=True), TENSORRT, "64 or 128", id="blocks-of-32"),
    pytest.param(
        None, D(8, block_size=64, block_axis=1, dynamic=True), TENSORRT, "4 bits in blocks", id="8-bit-blocks"
    ),
    pytest.param(
        None, D(4, block_size=64, block_axis=1, dynamic=True), TENSORRT, "divide the axis", id="broken-blocks"
    ),
    pytest.param(None, D((2, 1), axis=0), ALL, "FP8 E4M3, or 4-bit integers", id="fp4"),
    pytest.param(None, D((4, 3), block_size=32, scale_format="e8m0"), ALL, "FP8 E4M3, or 4-bit", id="mx"),
    pytest.param(D(8, block_size=2, dynamic=True), WEIGHT, ALL, "axis='tokens'", id="activation-blocks"),
    pytest.param(D(8, affine=True, dynamic=True), WEIGHT, ALL, "or a symmetric grid", id="dynamic-affine-int8"),
    pytest.param(
        D(8, unsigned=True, affine=True, dynamic=True, scale_amax=0.7),
        WEIGHT,
        ALL,
        "or a symmetric grid",
        id="dynamic-affine-scaled",
    ),
    pytest.param(D(8, axis=0, dynamic=True), WEIGHT, ALL, "axis=None or axis='tokens'", id="dynamic-axis"),
    pytest.param(D(2, scheme="twn"), WEIGHT, ALL, 'scheme="bnn"', id="weight-scheme"),
    pytest.param(None, D((4, 3), dynamic=True), ALL, "dynamic=False, calibrated", id="dynamic-fp8"),
]


SHAPE = (6, 96)
"""Of the weight; 64 does not divide 96."""


def quantized(grid: D | None, weight: D) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(128, 6)
    fq.quantize(model, fq.Recipe() + fq.Rule(input=grid, weight=weight))
    if any(q.needs_range and q.is_enabled for q in model.children()):
        fq.calibrate(model, [torch.randn(2, 128)], progress=False)
    return model


@pytest.mark.parametrize(("grid", "weight", "targets", "instead"), REFUSED)
def test_a_refusal_names_the_quantizer_and_what_to_use(grid, weight, targets, instead):
    uses = {"a": Use(weight, SHAPE)} if grid is None else {"w": Use(weight, SHAPE), "a": Use(grid, None)}
    for target in targets:
        with pytest.raises(fq.ExportError, match=rf"target '{target}': expected .*{instead}.*, got .*: a \("):
            check_accepted(target, uses)
    for target in set(ALL) - set(targets):
        check_accepted(target, uses)


def test_a_refused_grid_leaves_no_file(tmp_path):
    model = quantized(D(8, affine=True, unsigned=True), WEIGHT)
    with pytest.raises(fq.ExportError, match=r"got an affine grid.*\(R1\): _input_quantizer \("):
        fq.export_onnx(model, (torch.zeros(2, 128),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("grid", "weight", "target"),
    [
        pytest.param(None, D(4, block_size=64, block_axis=1, dynamic=True), "tensorrt", id="blocks-of-64"),
        pytest.param(D(8), WEIGHT, "tensorrt", id="dynamic-weight"),
        pytest.param(D((5, 2)), WEIGHT, "onnxruntime", id="e5m2"),
        pytest.param(D(8, affine=True, unsigned=True), WEIGHT, "onnxruntime-cuda", id="affine"),
        pytest.param(D(8, affine=True), WEIGHT, "onnxruntime", id="affine-int8"),
    ],
)
def test_what_a_target_takes(tmp_path, grid, weight, target):
    model, x = quantized(grid, weight), torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target=target)
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.sqnr_db >= 90


def test_the_opset_is_the_first_that_holds_every_grid(tmp_path):
    model = quantized(None, D(4, block_size=64, block_axis=1, dynamic=True))
    assert fq.export_onnx(model, (torch.zeros(2, 128),), tmp_path / "m.onnx").opset == 21


def test_blocks_below_opset_21_are_an_error(tmp_path):
    model = quantized(None, D(4, block_size=64, block_axis=1, dynamic=True))
    with pytest.raises(fq.ExportError, match="opset: expected 21 or later, got 20, for _weight_quantizer"):
        fq.export_onnx(model, (torch.zeros(2, 128),), tmp_path / "m.onnx", opset=20)


def test_fp8_in_blocks_is_refused_with_what_to_use(tmp_path):
    model = quantized(None, D((4, 3), block_size=64, dynamic=True))
    with pytest.raises(fq.ExportError, match="expected FP8 E4M3 per tensor or channel, or .* got FP8 in blocks"):
        fq.export_onnx(model, (torch.zeros(2, 128),), tmp_path / "m.onnx", target="onnxruntime")


def test_what_no_opset_holds_is_not_said_to_need_a_later_one(tmp_path):
    model = quantized(None, D((4, 3), block_size=32, scale_format="e8m0", dynamic=True))
    with pytest.raises(fq.ExportError, match="which are simulated only"):
        fq.export_onnx(model, (torch.zeros(2, 128),), tmp_path / "m.onnx", target="onnxruntime", opset=17)


@pytest.mark.parametrize("shape", [(128,), (2, 128), (2, 3, 128)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_blocks_take_data_of_any_rank(tmp_path, shape, bits):
    model, x = quantized(None, D(bits, block_size=64, dynamic=True)), torch.randn(shape)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime")
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.sqnr_db >= 90
