"""The trtexec line for each TensorRT."""

import shlex

import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export import tensorrt_command

PLAIN = """
<ir_version: 9, opset_import: ["": 19]>
g (float[2, 4] x) => (float[2, 4] y) <float s = {0.1}, int8 z = {0}>
{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }
"""
HALF = PLAIN.replace(
    "y = DequantizeLinear(q, s, z)", "d = DequantizeLinear(q, s, z) h = Cast<to = 10>(d) y = Cast<to = 1>(h)"
)
BFLOAT = HALF.replace("to = 10", "to = 16")
CODES = PLAIN.replace("int8 z = {0}", "int8 z = {0}, int8[4] w = {1, 2, 3, 4}").replace(
    "y = Deq", "wd = DequantizeLinear(w, s, z) d = Deq"
).replace("(q, s, z) }", "(q, s, z) y = Add(d, wd) }")  # fmt: skip
DYNAMIC = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N, 3, H, W] x, float[4] fixed, float[N, 8] ids) => (float[N, 3, H, W] y, float[4] f, float[N, 8] i)
{ y = Relu(x) f = Relu(fixed) i = Relu(ids) }
"""
SHAPES = {"x": ((1, 3, 32, 32), (8, 3, 224, 224), (32, 3, 256, 256)), "ids": ([1, 8], [8, 8], [32, 8])}
SHOWN = ["--profilingVerbosity=detailed", "--dumpLayerInfo"]


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "m.onnx", opset: int = 19):
        path = tmp_path / name
        onnx.save(onnx.parser.parse_model(text.replace('"": 19', f'"": {opset}')), path)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "version", "flags"),
    [
        (PLAIN, 8, ["--int8", "--fp16"]),
        (PLAIN, 9, ["--int8", "--fp16"]),
        (PLAIN, 10, ["--int8", "--fp16"]),
        (PLAIN, 11, []),
        (CODES, 10, ["--int8", "--fp16"]),
        (CODES, 11, []),
        (HALF, 10, ["--stronglyTyped"]),
        (HALF, 11, []),
        (PLAIN.replace("int8", "float8e4m3fn"), 10, ["--stronglyTyped"]),
        (BFLOAT, 10, ["--stronglyTyped"]),
    ],
)
def test_the_precision_flags(file, text, version, flags):
    path = file(text)
    assert shlex.split(tensorrt_command(path, version=version)) == ["trtexec", f"--onnx={path}", *flags, *SHOWN]


def test_it_is_for_tensorrt_10_unless_asked(file):
    assert tensorrt_command(file(PLAIN)) == tensorrt_command(file(PLAIN), version=10)


def test_the_whole_line(file, monkeypatch, tmp_path):
    file(DYNAMIC, "net.onnx")
    monkeypatch.chdir(tmp_path)
    assert tensorrt_command("net.onnx", engine="net.plan", shapes=SHAPES) == (
        "trtexec --onnx=net.onnx --int8 --fp16 --minShapes=x:1x3x32x32,ids:1x8 --optShapes=x:8x3x224x224,ids:8x8 "
        "--maxShapes=x:32x3x256x256,ids:32x8 --saveEngine=net.plan --profilingVerbosity=detailed --dumpLayerInfo"
    )


def test_names_are_quoted_for_the_shell_and_for_trtexec(file):
    path = file(DYNAMIC.replace("x,", '"in put:0",').replace("Relu(x)", 'Relu("in put:0")'), "a b$(c).onnx")
    model = onnx.load(path)
    assert model.graph.input[0].name == "in put:0"
    line = tensorrt_command(path, shapes={"in put:0": SHAPES["x"], "ids": SHAPES["ids"]})
    words = shlex.split(line)
    assert words[1] == f"--onnx={path}"
    assert words[4] == "--minShapes='in put:0':1x3x32x32,ids:1x8"


@pytest.mark.parametrize("version", [7, 12, "10", 10.3, None])
def test_an_unknown_version(file, version):
    with pytest.raises(fq.InvalidValueError, match=r"version: expected one of \[8, 9, 10, 11\], got "):
        tensorrt_command(file(PLAIN), version=version)


@pytest.mark.parametrize("version", [8, 9])
def test_stored_integers_need_tensorrt_10(file, version):
    words = (
        rf'm.onnx: expected float weights .* TensorRT {version} \(R16\), got 1 .* as w\. Export with weights="float"'
    )
    with pytest.raises(fq.InvalidValueError, match=words):
        tensorrt_command(file(CODES), version=version)


@pytest.mark.parametrize("version", [8, 9])
def test_half_precision_needs_tensorrt_10(file, version):
    with pytest.raises(fq.InvalidValueError, match=rf"m.onnx: .* for TensorRT {version}, got FLOAT16"):
        tensorrt_command(file(HALF), version=version)


@pytest.mark.parametrize(("version", "newest"), [(8, 19), (9, 19), (10, 24), (11, 25)])
def test_a_newer_opset(file, version, newest):
    tensorrt_command(file(PLAIN, opset=newest), version=version)
    with pytest.raises(fq.InvalidValueError, match=rf"m.onnx: expected opset up to {newest} for .*, got {newest + 1}"):
        tensorrt_command(file(PLAIN, opset=newest + 1), version=version)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (None, r"shapes: x: expected \(smallest, usual, largest\) for \[N,3,H,W\], got none"),
        ({"x": SHAPES["x"]}, r"shapes: ids: expected .*\[N,8\], got none"),
        ({**SHAPES, "z": SHAPES["x"]}, r"shapes: z: expected one of the dynamic inputs \['x', 'ids'\], got no such"),
        ({**SHAPES, "fixed": ((4,),) * 3}, r"shapes: fixed: .*, got a static one, \[4\]"),
        ({**SHAPES, "x": ((1, 4, 9, 9),) * 3}, r"shapes: x: expected three .* that fit \[N,3,H,W\], got \(\(1, 4"),
        ({**SHAPES, "x": ((1, 3, 9),) * 3}, "shapes: x: expected three"),
        ({**SHAPES, "x": ((1, 3, 9, 9),) * 2}, "shapes: x: expected three"),
        ({**SHAPES, "x": ((2, 3, 9, 9), (1, 3, 9, 9), (2, 3, 9, 9))}, "shapes: x: .* smallest to largest"),
        ({**SHAPES, "x": ((1, 3, 9, 9), (1, 3, 9, 9), (1, 3, 8, 9))}, "shapes: x: .* smallest to largest"),
        ({**SHAPES, "x": ((0, 3, 9, 9), (1, 3, 9, 9), (1, 3, 9, 9))}, "shapes: x: expected three"),
        ({**SHAPES, "x": ((1.0, 3, 9, 9), (1, 3, 9, 9), (1, 3, 9, 9))}, "shapes: x: expected three"),
        ({**SHAPES, "x": (1, 3, 224)}, r"shapes: x: expected three .*, got \(1, 3, 224\)"),
        ({**SHAPES, "x": 8}, "shapes: x: expected three .*, got 8"),
    ],
)
def test_wrong_shapes(file, shapes, words):
    with pytest.raises(fq.InvalidValueError, match=words):
        tensorrt_command(file(DYNAMIC), shapes=shapes)


@pytest.mark.parametrize(("content", "words"), [(None, "nothing there"), (b"no ONNX", "expected an ONNX file")])
def test_what_is_no_onnx_file(tmp_path, content, words):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(fq.ValidationError, match=words):
        tensorrt_command(tmp_path / "m.onnx")


@pytest.mark.parametrize(("weights", "oldest"), [("int8", 10), ("float", 8)])
def test_files_of_fakequant(tmp_path, weights, oldest):
    model, x = nn.Conv2d(16, 16, 3).eval(), torch.rand(1, 16, 8, 8)
    fq.quantize(model, example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", weights=weights)
    for version in (8, 9, 10, 11):
        if version >= oldest:
            assert tensorrt_command(tmp_path / "m.onnx", version=version).startswith("trtexec --onnx=")
        else:
            with pytest.raises(fq.InvalidValueError, match="R16"):
                tensorrt_command(tmp_path / "m.onnx", version=version)
