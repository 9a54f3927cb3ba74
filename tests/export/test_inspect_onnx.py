"""inspect_onnx says of each op whether it runs in integers, and why not; the optimized graph is the judge."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import onnx
import onnx.parser
import pytest

from fakequant.errors import ValidationError
from fakequant.export import Session, match_kernels
from fakequant.export.graph import MODULE_KEY
from fakequant.export.inspect_onnx import inspect_onnx
from fakequant.export.kernels import KERNELS
from fakequant.export.load import load_model
from fakequant.export.reasons import reasons_for, registry

INITIALIZERS = """
    float s = {0.05}, float t = {0.05}, float s2 = {0.1}, float s6 = {0.0235294}, float[1] s61 = {0.0235294},
    int8 j = {0}, uint8 u = {128}, uint8 z = {0}, int8 i = {0}, int8 m = {-128}, int16 h = {0},
    float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0}, uint8[2] wu = {128, 128},
    int8[2, 2, 1, 1] w = {1, 2, 3, 4}, uint8[2, 2, 1, 1] w8 = {1, 2, 3, 4}, float[2, 2, 1, 1] wf = {1, 2, 3, 4},
    int8[2, 2] v = {1, 2, 3, 4}, float[2, 2] vf = {1, 2, 3, 4},
    float[2] b = {0.1, 0.2}, float[1] b1 = {0.1}, float[1, 2] br = {0.1, 0.2}, float[1, 1, 2] b3 = {0.1, 0.2},
    int32[2] b32 = {3, 4}, float[2] bs = {0.005, 0.01}, int32[2] bz = {0, 0},
    int8[2, 1, 1] k = {1, 2}, uint8[2, 1, 1] k8 = {1, 2}, float[2, 1, 1] kf = {1, 2},
    float zero = {0}, float six = {6}, float[2] mean = {0, 0}, float[2] var = {1, 1},
    int64[1] zeroth = {0}, int64[1] first = {1}
"""
X = {
    "image": "float[1, 2, 4, 4] x",
    "rows": "float[3, 2] x",
    "sequence": "float[3, 4, 2] x",
    "dynamic": "float[N, 4, 2] x",
}


def x(grid: str, to: str = "x", scale: str = "s") -> str:
    """Return a Q and a DQ of the graph's input; their outputs are `<to>q` and `<to>d`."""
    return f"{to}q = QuantizeLinear(x, {scale}, {grid}) {to}d = DequantizeLinear({to}q, {scale}, {grid}) "


def q(value: str, grid: str, to: str = "y", scale: str = "s") -> str:
    return f" {to}q = QuantizeLinear({value}, {scale}, {grid}) {to} = DequantizeLinear({to}q, {scale}, {grid}) "


W = "wd = DequantizeLinear<axis = 0>(w, ws, wz) "
V = "vd = DequantizeLinear<axis = 1>(v, ws, wz) "
VT = "vd = DequantizeLinear<axis = 0>(v, ws, wz) "
B32 = "bd = DequantizeLinear<axis = 0>(b32, bs, bz) "
CONV = W + "c = Conv(xd, wd, b) "
GEMM = VT + "c = Gemm<transB = 1>(xd, vd, b) "
GEMM_WITHOUT_BIAS = VT + "c = Gemm<transB = 1>(xd, vd) "
MATMUL = V + "c = MatMul(xd, vd) "
RELU = "r = Relu(c) "
CLIP = "r = Clip(c, zero, six) "
POOL = "c = MaxPool<kernel_shape = [2, 2]>(xd) "
AVERAGE = "c = AveragePool<kernel_shape = [2, 2]>(xd) "
TANH = "y = Tanh(c)"
TWO = x("u", "a") + x("u", "b", "s2")

# What the graph's input is, the graph, op type, its kernel.
INTEGER = {
    "conv-uint8": ("image", x("u") + CONV + q("c", "u"), "Conv", "QLinearConv"),
    "conv-int8": ("image", x("i") + CONV + q("c", "i"), "Conv", "QLinearConv"),
    "conv-int8-then-uint8": ("image", x("i") + CONV + q("c", "z"), "Conv", "QLinearConv"),
    "conv-weight-uint8": (
        "image", x("u") + CONV.replace("(w, ws, wz)", "(w8, ws, wu)") + q("c", "u"), "Conv", "QLinearConv",
    ),
    "conv-weight-per-tensor": (
        "image", x("u") + "wd = DequantizeLinear(w, s, i) c = Conv(xd, wd)" + q("c", "u"), "Conv", "QLinearConv",
    ),
    "conv-weight-with-q": (
        "image", x("u") + "wq = QuantizeLinear<axis = 0>(wf, ws, wz) wd = DequantizeLinear<axis = 0>(wq, ws, wz)"
        "c = Conv(xd, wd, b)" + q("c", "u"), "Conv", "QLinearConv",
    ),
    "conv-float-weight": ("image", x("u") + "c = Conv(xd, wf, b)" + q("c", "u"), "Conv", "QLinearConv"),
    "conv-int32-bias": ("image", x("u") + W + B32 + "c = Conv(xd, wd, bd)" + q("c", "u"), "Conv", "QLinearConv"),
    "conv-no-zero-point": (
        "image", "xq = QuantizeLinear(x, s) xd = DequantizeLinear(xq, s)" + CONV
        + "yq = QuantizeLinear(c, s) y = DequantizeLinear(yq, s)", "Conv", "QLinearConv",
    ),
    "conv-relu-uint8": ("image", x("u") + CONV + RELU + q("r", "z"), "Conv", "QLinearConv"),
    "conv-relu-int8-lowest": ("image", x("i") + CONV + RELU + q("r", "m"), "Conv", "QLinearConv"),
    "conv-clip": ("image", x("u") + CONV + CLIP + q("r", "z", scale="s6"), "Conv", "QLinearConv"),
    "conv-maxpool": (
        "image", x("u") + CONV + RELU + "p = MaxPool<kernel_shape = [2, 2]>(r)" + q("p", "z"), "Conv", "QLinearConv",
    ),
    "conv-sigmoid-apart": (
        "image", x("u") + CONV + q("c", "u", "d") + "e = Sigmoid(d)" + q("e", "u"), "Conv", "QLinearConv",
    ),
    "sigmoid": ("image", x("u") + "c = Sigmoid(xd)" + q("c", "u"), "Sigmoid", "QLinearSigmoid"),
    "gemm-q": ("rows", x("u") + GEMM + q("c", "u"), "Gemm", "QGemm"),
    "gemm-relu": ("rows", x("u") + GEMM + RELU + q("r", "z"), "Gemm", "QGemm"),
    "gemm-alpha": (
        "rows", x("u") + GEMM_WITHOUT_BIAS.replace("transB", "alpha = 0.5, transB") + q("c", "u"), "Gemm", "QGemm",
    ),
    "gemm-no-bias": ("rows", x("u") + GEMM_WITHOUT_BIAS + TANH, "Gemm", "QGemm"),
    "gemm-int32-bias": ("rows", x("u") + VT + B32 + "c = Gemm<transB = 1>(xd, vd, bd)" + TANH, "Gemm", "QGemm"),
    "gemm-fork-int8": (
        "rows", x("i") + GEMM_WITHOUT_BIAS + "d = Tanh(xd) y = Add(c, d)", "Gemm", "QGemm",
    ),
    "gemm-float-weight": ("rows", x("u") + "c = Gemm(xd, vf, b)" + q("c", "u"), "Gemm", "QGemm"),
    "matmul-q": ("rows", x("u") + MATMUL + q("c", "u"), "MatMul", "QLinearMatMul"),
    "matmul": ("rows", x("u") + MATMUL + TANH, "MatMul", "MatMulIntegerToFloat"),
    "matmul-int8": ("rows", x("i") + MATMUL + TANH, "MatMul", "MatMulIntegerToFloat"),
    "matmul-int8-q-per-reader": (
        "rows", "xq = QuantizeLinear(x, s, i) xd = DequantizeLinear(xq, s, i)" + MATMUL
        + "eq = QuantizeLinear(x, t, j) ed = DequantizeLinear(eq, t, j) e = Tanh(ed) y = Sub(c, e)", "MatMul",
        "MatMulIntegerToFloat",
    ),
    "matmul-transposed": (
        "rows", x("u") + VT + "e = Transpose<perm = [1, 0]>(vd) c = MatMul(xd, e)" + TANH, "MatMul",
        "MatMulIntegerToFloat",
    ),
    "matmul-add-q": ("rows", x("u") + MATMUL + "d = Add(c, b)" + q("d", "u"), "MatMul", "QGemm"),
    "matmul-add-int32": ("rows", x("u") + MATMUL + B32 + "d = Add(c, bd) y = Tanh(d)", "MatMul", "QGemm"),
    "matmul-add-dynamic": ("dynamic", x("u") + MATMUL + "d = Add(c, b) y = Tanh(d)", "MatMul", "MatMulIntegerToFloat"),
    "matmul-add-rank-3": ("sequence", x("u") + MATMUL + "d = Add(c, b3) y = Tanh(d)", "MatMul", "MatMulIntegerToFloat"),
    "matmul-activations": ("image", TWO + "c = MatMul(ad, bd) y = Tanh(c)", "MatMul", "MatMulIntegerToFloat"),
    "matmul-relu-output": ("rows", x("u") + MATMUL + "y = Relu(c)", "MatMul", "MatMulIntegerToFloat"),
    "matmul-weight-only": ("rows", V + "c = MatMul(x, vd)" + TANH, "MatMul", "MatMulNBits"),
    "gemm-weight-only": ("rows", V + "c = Gemm(x, vd)" + TANH, "Gemm", "MatMulNBits"),
    "add": ("image", TWO + "c = Add(ad, bd)" + q("c", "u"), "Add", "QLinearAdd"),
    "add-relu": ("image", TWO + "c = Add(ad, bd)" + RELU + q("r", "z"), "Add", "QLinearAdd"),
    "add-constant": (
        "image", x("u") + "kd = DequantizeLinear(k8, s, u) c = Add(xd, kd)" + q("c", "u"), "Add", "QLinearAdd",
    ),
    "mul": ("image", TWO + "c = Mul(ad, bd)" + q("c", "u"), "Mul", "QLinearMul"),
    "concat": ("image", TWO + "c = Concat<axis = 1>(ad, bd)" + q("c", "u"), "Concat", "QLinearConcat"),
    "maxpool": ("image", x("u") + POOL + q("c", "u"), "MaxPool", "MaxPool"),
    "maxpool-int8-then-uint8": ("image", x("i") + POOL + q("c", "u"), "MaxPool", "MaxPool"),
    "maxpool-q-behind": ("image", "c = MaxPool<kernel_shape = [2, 2]>(x)" + q("c", "u"), "MaxPool", "MaxPool"),
    "maxpool-dq-in-front": ("image", x("u") + POOL + TANH, "MaxPool", "MaxPool"),
    "maxpool-conv": (
        "image", x("u") + CONV + q("c", "u", "d") + "p = MaxPool<kernel_shape = [2, 2]>(d)" + q("p", "u"),
        "MaxPool", "NhwcMaxPool",
    ),
    "averagepool": ("image", x("u") + AVERAGE + q("c", "u"), "AveragePool", "QLinearAveragePool"),
    "globalaveragepool": (
        "image", x("u") + "c = GlobalAveragePool(xd)" + q("c", "u"), "GlobalAveragePool", "QLinearGlobalAveragePool",
    ),
    "softmax": ("image", x("u") + "c = Softmax<axis = 1>(xd)" + q("c", "u"), "Softmax", "QLinearSoftmax"),
}  # fmt: skip

NO_Q = "no QuantizeLinear on its output; Tanh is behind it"
GRAPH_OUTPUT = "no QuantizeLinear on its output, which is an output of the graph"
ONE_OF_SEVERAL = "its output is read 2 times, not by one QuantizeLinear alone"
ABSORBS = "uint8 with zero point 0 is"
FLOAT_BIAS = "float bias and no QuantizeLinear on its output"
FORK = "its input is int8 and is read by 2 ops"
STAYS = "(stays so: 2 ops read it)"

# What the graph's input is, the graph, op type, the reason.
FLOAT = {
    "conv-no-q": ("image", x("u") + CONV + TANH, "Conv", NO_Q),
    "conv-output": ("image", x("u") + W + "y = Conv(xd, wd, b)", "Conv", GRAPH_OUTPUT),
    "conv-two-consumers": (
        "image", x("u") + CONV + q("c", "u", "d") + "e = Tanh(c) y = Sub(d, e)", "Conv", ONE_OF_SEVERAL,
    ),
    "conv-two-qs": (
        "image", x("u") + CONV + q("c", "u", "d") + q("c", "u", "e", "s2") + "y = Sub(d, e)", "Conv", ONE_OF_SEVERAL,
    ),
    "conv-q-and-output": (
        "image", x("u") + W + "y2 = Conv(xd, wd, b)" + q("y2", "u"), "Conv",
        "its output is read once and is an output of the graph, not by one QuantizeLinear alone",
    ),
    "conv-int8-fork": ("image", x("i") + CONV + q("c", "i", "d") + "e = Tanh(xd) y = Sub(d, e)", "Conv", FORK),
    "conv-int8-output-fork": (
        "image", x("i") + CONV + q("c", "i", "d") + "e = Tanh(d) y = Sub(d, e)", "Conv",
        f"types differ: input int8 (runs as uint8); output int8 {STAYS}",
    ),
    "conv-int8-output-and-graph-output": (
        "image", x("i") + CONV + q("c", "i") + "y2 = Tanh(y)", "Conv",
        f"types differ: input int8 (runs as uint8); output int8 {STAYS}",
    ),
    "conv-batchnorm": (
        "image", x("u") + CONV + "n = BatchNormalization(c, b, b, mean, var)" + q("n", "u"), "Conv",
        "no QuantizeLinear on its output; BatchNormalization is behind it",
    ),
    "conv-relu-int8": (
        "image", x("i") + CONV + RELU + q("r", "i"), "Conv",
        f"Relu behind it is not absorbed: the output's grid is int8 with zero point 0; {ABSORBS}",
    ),
    "conv-relu-uint8-middle": (
        "image", x("u") + CONV + RELU + q("r", "u"), "Conv",
        f"Relu behind it is not absorbed: the output's grid is uint8 with zero point 128; {ABSORBS}",
    ),
    "conv-identity-relu": (
        "image", x("i") + CONV + "e = Identity(c) r = Relu(e)" + q("r", "i"), "Conv",
        f"Relu behind it is not absorbed: the output's grid is int8 with zero point 0; {ABSORBS}",
    ),
    "conv-relu-no-q": (
        "image", x("u") + CONV + RELU + "y = Tanh(r)", "Conv", "no QuantizeLinear on its output; Relu is behind it",
    ),
    "conv-relu-two-consumers": (
        "image", x("u") + CONV + RELU + q("r", "z", "d") + "e = Tanh(r) y = Sub(d, e)", "Conv",
        "the Relu behind it is read 2 times, not by one QuantizeLinear alone",
    ),
    "conv-clip-wide": (
        "image", x("u") + CONV + CLIP + q("r", "z", scale="s"), "Conv",
        "Clip behind it is not absorbed: the output's grid is uint8 with zero point 0 and scale 0.05"
        "…, not within its bounds",
    ),
    "conv-clip-vector-scale": (
        "image", x("u") + CONV + CLIP + "rq = QuantizeLinear(r, s61, z) y = DequantizeLinear(rq, s61, z)", "Conv",
        "Clip behind it is not absorbed: the output's grid is uint8 with zero point 0 and scale [0.0235294], "
        "not within its bounds",
    ),
    "conv-sigmoid": (
        "image", x("u") + CONV + "d = Sigmoid(c)" + q("d", "u"), "Conv",
        "no QuantizeLinear on its output; Sigmoid is behind it",
    ),
    "conv-leakyrelu": (
        "image", x("u") + CONV + "d = LeakyRelu(c)" + q("d", "u"), "Conv",
        "no QuantizeLinear on its output; LeakyRelu is behind it",
    ),
    "conv-weight-only": ("image", W + "c = Conv(x, wd, b)" + q("c", "u"), "Conv", "input 0 is a float"),
    "conv-int16": (
        "image", x("h") + CONV + q("c", "h"), "Conv", "there are integer kernels for int8 and uint8, not for int16",
    ),
    "convtranspose": (
        "image", x("u") + W + "c = ConvTranspose(xd, wd, b)" + q("c", "u"), "ConvTranspose",
        "ConvTranspose has no integer kernel",
    ),
    "gemm-float-bias": ("rows", x("u") + GEMM + TANH, "Gemm", FLOAT_BIAS),
    "gemm-beta": (
        "rows", x("u") + GEMM.replace("transB = 1", "transB = 1, beta = 0.5") + q("c", "u"), "Gemm",
        "it has a bias and beta is 0.5, not 1",
    ),
    "gemm-alpha": (
        "rows", x("u") + GEMM.replace("transB = 1", "transB = 1, alpha = 0.5") + q("c", "u"), "Gemm",
        "it has a bias and alpha is 0.5, not 1",
    ),
    "gemm-short-bias": (
        "rows", x("u") + VT + "c = Gemm<transB = 1>(xd, vd, b1)" + q("c", "u"), "Gemm",
        "its bias is of shape [1], not [2]",
    ),
    "gemm-computed-bias": (
        "rows", x("u") + VT + "f = ReduceMax<keepdims = 0>(x, zeroth) c = Gemm<transB = 1>(xd, vd, f)" + q("c", "u"),
        "Gemm", "its bias is computed in the graph",
    ),
    "matmul-add-row": (
        "rows", x("u") + MATMUL + "d = Add(c, br)" + q("d", "u"), "MatMul",
        "it becomes a Gemm with the Add behind it: its bias is of shape [1, 2], not [2]",
    ),
    "gemm-relu-no-q": (
        "rows", x("u") + GEMM_WITHOUT_BIAS + RELU + "y = Tanh(r)", "Gemm",
        "Relu and then Tanh, no QuantizeLinear, behind it",
    ),
    "gemm-two-consumers": (
        "rows", x("u") + GEMM + q("c", "u", "d") + "e = Tanh(c) y = Sub(d, e)", "Gemm",
        f"{ONE_OF_SEVERAL}; {FLOAT_BIAS}",
    ),
    "gemm-types": ("rows", x("u") + GEMM + q("c", "i", "d") + "e = Tanh(d) y = Sub(d, e)", "Gemm",
        f"types differ: input uint8; output int8 {STAYS}",
    ),
    "gemm-weight-only": ("rows", VT + "c = Gemm<transB = 1>(x, vd)" + TANH, "Gemm", "input 0 is a float"),
    "matmul-int8-fork": ("rows", x("i") + MATMUL + "d = Tanh(xd) y = Sub(c, d)", "MatMul", FORK),
    "matmul-int8-q-per-reader-one-zero-point": (
        "rows", "xq = QuantizeLinear(x, s, i) xd = DequantizeLinear(xq, s, i)" + MATMUL
        + "eq = QuantizeLinear(x, t, i) ed = DequantizeLinear(eq, t, i) e = Tanh(ed) y = Sub(c, e)", "MatMul", FORK,
    ),
    "matmul-add": (
        "rows", x("u") + MATMUL + "d = Add(c, b) y = Tanh(d)", "MatMul",
        f"it becomes a Gemm with the Add behind it: {FLOAT_BIAS}",
    ),
    "matmul-add-static-rank-3": (
        "sequence", x("u") + MATMUL + "d = Add(c, b) y = Tanh(d)", "MatMul",
        f"it becomes a Gemm with the Add behind it: {FLOAT_BIAS}",
    ),
    "matmul-relu-no-q": (
        "rows", x("u") + MATMUL + RELU + "y = Tanh(r)", "MatMul", "Relu and then Tanh, no QuantizeLinear, behind it",
    ),
    "matmul-float-weight": (
        "rows", x("u") + "c = MatMul(xd, vf)" + q("c", "u"), "MatMul", "input 1 is a float constant",
    ),
    "matmul-relu-int8": (
        "rows", x("i") + MATMUL + RELU + q("r", "i"), "MatMul",
        f"Relu behind it is not absorbed: the output's grid is int8 with zero point 0; {ABSORBS}",
    ),
    "add-float-side": ("image", x("u") + "e = Tanh(x) c = Add(xd, e)" + q("c", "u"), "Add", "input 1 is a float"),
    "add-no-q": ("image", TWO + "c = Add(ad, bd)" + TANH, "Add", NO_Q),
    "add-flatten": (
        "rows", TWO + "c = Add(ad, bd) d = Flatten(c)" + q("d", "u"), "Add",
        "no QuantizeLinear on its output; Flatten is behind it",
    ),
    "add-mixed": (
        "image", x("u", "a") + x("i", "b") + "c = Add(ad, bd) e = Tanh(bd)" + q("c", "u", "d") + "y = Sub(d, e)", "Add",
        f"types differ: input uint8, int8 {STAYS}; output uint8",
    ),
    "add-float-constant": ("image", x("u") + "c = Add(xd, kf)" + q("c", "u"), "Add", "input 1 is a float constant"),
    "add-int8-constant": (
        "image", x("u") + "kd = DequantizeLinear(k, s, i) c = Add(xd, kd)" + q("c", "u"), "Add",
        "types differ: input uint8, int8; output uint8",
    ),
    "mul-float-side": ("image", x("u") + "e = Tanh(x) c = Mul(e, xd)" + q("c", "u"), "Mul", "input 0 is a float"),
    "mul-no-q": ("image", TWO + "c = Mul(ad, bd)" + TANH, "Mul", NO_Q),
    "concat-no-q": ("image", TWO + "c = Concat<axis = 1>(ad, bd)" + TANH, "Concat", NO_Q),
    "concat-float-side": (
        "image", x("u") + "e = Tanh(x) c = Concat<axis = 1>(xd, e)" + q("c", "u"), "Concat", "input 1 is a float",
    ),
    "concat-mixed": (
        "image", x("i", "a") + x("u", "b") + "c = Concat<axis = 1>(ad, bd) e = Tanh(ad)" + q("c", "u", "d")
        + "f = GlobalMaxPool(d) g = GlobalMaxPool(e) y = Concat<axis = 1>(f, g)", "Concat",
        f"types differ: input int8 {STAYS}, uint8; output uint8",
    ),
    "maxpool-scales": (
        "image", x("u") + POOL + q("c", "u", scale="s2"), "MaxPool",
        "the scales or zero points in front of it and behind it differ",
    ),
    "maxpool-int8-fork": (
        "image", x("i") + POOL + "d = Tanh(c) e = Sin(c) y = Sub(d, e)", "MaxPool",
        f"types differ: input int8 (runs as uint8); output int8 {STAYS}",
    ),
    "averagepool-no-q": ("image", x("u") + AVERAGE + TANH, "AveragePool", NO_Q),
    "globalaveragepool-no-q": (
        "image", x("u") + "c = GlobalAveragePool(xd)" + TANH, "GlobalAveragePool", NO_Q,
    ),
    "reducemean": (
        "image", x("u") + "c = ReduceMean(xd, first)" + q("c", "u"), "ReduceMean",
        "ReduceMean has no integer kernel; GlobalAveragePool has",
    ),
    "softmax-no-q": ("image", x("u") + "c = Softmax<axis = 1>(xd)" + TANH, "Softmax", NO_Q),
    "softmax-types": (
        "image", x("i") + "c = Softmax<axis = 1>(xd) d = Tanh(xd)" + q("c", "z", "e") + "y = Sub(d, e)", "Softmax",
        f"types differ: input int8 {STAYS}; output uint8",
    ),
    "sigmoid-no-q": ("image", x("u") + "c = Sigmoid(xd)" + TANH, "Sigmoid", NO_Q),
}  # fmt: skip


def save(path: Path, kind: str, body: str, opset: int = 21) -> Path:
    """Write the ONNX text of a graph; y2, where there is one, is an output too."""
    shape = ", ".join("ABCD"[: X[kind].count(",") + 1])
    outputs = f"float[{shape}] y, float[{shape}] y2" if "y2 =" in body else f"float[{shape}] y"
    text = f"agraph ({X[kind]}) => ({outputs}) <{INITIALIZERS}> {{ {body} }}"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}'), path)
    return path


@pytest.mark.parametrize(("kind", "body", "op_type", "kernel"), INTEGER.values(), ids=INTEGER)
def test_an_integer_op(tmp_path, optimized_ops, kind, body, op_type, kernel):
    path = save(tmp_path / "m.onnx", kind, body)
    assert optimized_ops(path)[kernel]
    (op,) = [op for op in inspect_onnx(path).ops if op.op_type == op_type]
    assert (op.kernel, op.is_integer, op.reason) == (kernel, True, "")


# A weight alone is enough for MatMulNBits; its data being float is a reason against all others.
FULLY_QUANTIZED = {name: case for name, case in INTEGER.items() if case[-1] != "MatMulNBits"}


@pytest.mark.parametrize(("kind", "body", "op_type", "kernel"), FULLY_QUANTIZED.values(), ids=FULLY_QUANTIZED)
def test_no_reason_holds_for_an_integer_op(tmp_path, kind, body, op_type, kernel):
    model = load_model(save(tmp_path / "m.onnx", kind, body))
    (node,) = [node for node in model.graph if node.op_type == op_type]
    assert reasons_for(node) == ()


@pytest.mark.parametrize(("kind", "body", "op_type", "reason"), FLOAT.values(), ids=FLOAT)
def test_a_float_op_has_its_reason(tmp_path, kind, body, op_type, reason):
    path = save(tmp_path / "m.onnx", kind, body)
    op = next(op for op in inspect_onnx(path).ops if op.op_type == op_type)
    assert (op.is_integer, op.has_qdq) == (False, True)
    assert re.fullmatch(re.escape(reason).replace("…", r"\d*"), op.reason), op.reason


@pytest.mark.parametrize(("kind", "body", "op_type", "reason"), FLOAT.values(), ids=FLOAT)
def test_the_optimized_graph_agrees(tmp_path, integer_ops, kind, body, op_type, reason):
    path = save(tmp_path / "m.onnx", kind, body)
    kernels = Counter(op.kernel for op in inspect_onnx(path).ops if op.is_integer)
    assert kernels == integer_ops(path)
    assert not set(kernels) & KERNELS[op_type].integer


def test_a_max_pool_of_opset_11_takes_floats(tmp_path):
    path = save(tmp_path / "m.onnx", "image", x("u") + POOL + q("c", "u"), opset=11)
    (op,) = inspect_onnx(path).ops
    assert not op.is_integer
    assert op.reason == "MaxPool of opset 11 takes floats only; that of opset 12 takes integers"


def test_what_no_reason_explains_is_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REASONS", [])
    (op,) = inspect_onnx(save(tmp_path / "m.onnx", "image", x("u") + CONV + TANH)).ops
    assert op.reason == "no integer kernel, reason unknown"


def test_a_plain_float_op_needs_no_reason(tmp_path):
    report = inspect_onnx(save(tmp_path / "m.onnx", "image", "c = Conv(x, wf, b) r = Relu(c) y = Conv(r, wf)"))
    assert [(op.is_integer, op.has_qdq, op.reason) for op in report.ops] == [(False, False, "")] * 2
    assert "folded" not in {op.kernel for op in report.ops}
    assert report.float_with_qdq == ()


WIDE = "float[8, 2, 3, 3] wide = {" + ", ".join(["0.5"] * 144) + "}, float[8] bias = {1, 2, 3, 4, 5, 6, 7, 8}"


def test_a_blocked_float_kernel_is_found(tmp_path, optimized_ops):
    # Such a Conv bears the name of the Relu's output: <output>_nchwc.
    text = f"agraph (float[1, 2, 4, 4] x) => (float[1, 8, 2, 2] y) <{WIDE}> {{ c = Conv(x, wide, bias) y = Relu(c) }}"
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}'), path)
    assert optimized_ops(path)["ReorderOutput"]
    assert [(op.op_type, op.kernel) for op in inspect_onnx(path).ops] == [("Conv", "Conv")]


def test_an_op_that_is_merged_into_another_is_folded(tmp_path):
    path = save(tmp_path / "m.onnx", "rows", x("u") + MATMUL + "d = Add(c, b)" + q("d", "u"))
    assert [(op.op_type, op.kernel, op.is_integer) for op in inspect_onnx(path).ops] == [
        ("MatMul", "QGemm", True),
        ("Add", "folded", False),
    ]


def test_an_op_on_constants_is_folded(tmp_path):
    path = save(tmp_path / "m.onnx", "image", "d = Mul(wf, s) y = Conv(x, d)")
    assert [(op.op_type, op.kernel) for op in inspect_onnx(path).ops] == [("Mul", "folded"), ("Conv", "Conv")]


def test_what_is_folded_needs_no_reason(tmp_path):
    body = x("u") + CONV + "e = Add(c, xd) y = Relu(e)"
    conv, add = inspect_onnx(save(tmp_path / "m.onnx", "image", body)).ops
    assert (conv.kernel, add.kernel, add.has_qdq, add.reason) == ("FusedConv", "folded", True, "")


FOLDED = {
    "before-its-like": ("image", "d = Mul(kf, s) y = Mul(x, d)", ["folded", "Mul"]),
    "before-another": ("rows", "p = MatMul(br, vf) d = Sub(x, p) y = Gemm(d, vf)", ["folded", "Gemm"]),
}


@pytest.mark.parametrize(("kind", "body", "kernels"), FOLDED.values(), ids=FOLDED)
def test_the_kernel_of_what_follows_is_not_taken(tmp_path, kind, body, kernels):
    assert [op.kernel for op in inspect_onnx(save(tmp_path / "m.onnx", kind, body)).ops] == kernels


class _Nameless(Session):
    """An ONNX Runtime that names no node."""

    def __init__(self, path: Path, **options: bool) -> None:
        super().__init__(path, **options)
        self.nodes = tuple(dataclasses.replace(node, name="") for node in self.nodes)


def test_a_kernel_without_a_name_is_found_by_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(match_kernels, "Session", _Nameless)
    (op,) = inspect_onnx(save(tmp_path / "m.onnx", "rows", x("u") + MATMUL + TANH)).ops
    assert op.kernel == "MatMulIntegerToFloat"


def test_dynamic_quantization_is_found(tmp_path, optimized_ops):
    body = "xq, xs, xz = DynamicQuantizeLinear(x) xd = DequantizeLinear(xq, xs, xz)" + MATMUL + TANH
    path = save(tmp_path / "m.onnx", "rows", body)
    assert optimized_ops(path)["DynamicQuantizeMatMul"]
    assert [(op.kernel, op.is_integer) for op in inspect_onnx(path).ops] == [("DynamicQuantizeMatMul", True)]


def test_of_two_equal_ops_one_is_folded(tmp_path, optimized_ops):
    path = save(
        tmp_path / "m.onnx",
        "image",
        "c = MaxPool<kernel_shape = [1, 1]>(x) d = MaxPool<kernel_shape = [1, 1]>(x) e = Tanh(d) y = Sub(c, e)",
    )
    assert optimized_ops(path)["MaxPool"] == 1
    assert sorted(op.kernel for op in inspect_onnx(path).ops) == ["MaxPool", "folded"]


CHAIN = x("u") + CONV + q("c", "u", "d") + "e = Conv(d, wd, b) r = Relu(e)" + q("r", "u", "f") + "y = Conv(f, wd, b)"


@pytest.mark.parametrize(
    "names",
    [
        ("", "", ""),
        ("conv", "conv", "conv"),
        ("conv", "conv_token_1", "conv_token_2"),
        ("fakequant9/", "fakequant3/a", "fakequant1/b"),
        ("/block/conv", "fused conv", "conv/MatMulAddFusion"),
    ],
    ids=["none", "equal", "as-made-up", "as-numbered", "as-fused"],
)
def test_names_do_not_matter(tmp_path, names):
    path = save(tmp_path / "m.onnx", "image", CHAIN)
    proto = onnx.load(path)
    for node, name in zip([node for node in proto.graph.node if node.op_type == "Conv"], names, strict=True):
        node.name = name
    onnx.save(proto, path)
    ops = inspect_onnx(path).ops
    assert [op.kernel for op in ops] == ["QLinearConv", "FusedConv", "Conv"]
    assert tuple(op.name for op in ops) == names


def test_each_op_of_a_chain_has_its_own_kernel(tmp_path):
    body = x("u") + CONV + q("c", "u", "d") + POOL.replace("xd", "d").replace("c =", "p =") + q("p", "u", "g")
    body += "e = Conv(g, wd, b)" + RELU.replace("(c)", "(e)") + q("r", "z", "f") + "n = Add(f, g)" + q("n", "u")
    path = save(tmp_path / "m.onnx", "image", body)
    assert [(op.op_type, op.kernel) for op in inspect_onnx(path).ops] == [
        ("Conv", "QLinearConv"),
        ("MaxPool", "NhwcMaxPool"),
        ("Conv", "QLinearConv"),
        ("Add", "QLinearAdd"),
    ]


def test_ops_in_a_branch_are_found(tmp_path):
    inner = "<float[2] b2 = {1, 2}> { " + x("u") + W + "n = Conv(xd, wd, b2)" + q("n", "u", "o") + "}"
    body = f"y = If(yes) <then_branch = yes_graph () => (float[A, B, C, D] o) {inner}, "
    body += "else_branch = no_graph () => (float[A, B, C, D] p) { p = Identity(x) }>"
    text = f"agraph (bool yes, {X['image']}) => (float[A, B, C, D] y) <{INITIALIZERS}> {{ {body} }}"
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}'), path)
    (op,) = inspect_onnx(path).ops
    assert (op.kernel, op.is_integer) == ("QLinearConv", True)


def test_ops_in_a_function_are_found(tmp_path):
    path = save(tmp_path / "m.onnx", "image", x("u") + W + "c = own.Block(xd, wd, b)" + q("c", "u"))
    proto = onnx.load(path)
    proto.opset_import.append(
        onnx.parser.parse_model('<ir_version: 10, opset_import: ["own": 1]> g () => () {}').opset_import[0]
    )
    proto.functions.append(
        onnx.parser.parse_function(
            '<domain: "own", opset_import: ["": 21]> Block (a, w, b) => (c) { c = Conv(a, w, b) }'
        )
    )
    onnx.save(proto, path)
    assert [op.kernel for op in inspect_onnx(path).ops] == ["QLinearConv"]


def test_external_data_and_the_file_stay(tmp_path):
    path = save(tmp_path / "m.onnx", "image", x("u") + CONV + q("c", "u"))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert [op.is_integer for op in inspect_onnx(path).ops] == [True]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_report_in_words(tmp_path):
    path = save(tmp_path / "m.onnx", "image", CHAIN)
    proto = onnx.load(path)
    conv = [node for node in proto.graph.node if node.op_type == "Conv"]
    conv[0].name, conv[1].name, conv[2].name = "first", "second", "third"
    conv[1].metadata_props.add(key=MODULE_KEY, value="body.0.conv")
    onnx.save(proto, path)
    report = inspect_onnx(path)
    assert str(report).splitlines() == [
        f"{path} in ONNX Runtime CPU:",
        "  1 of 3 Conv run as integers, 2 in floats between Q and DQ",
        "  body.0.conv (Conv) runs as FusedConv: Relu behind it is not absorbed: the output's grid is uint8 with zero "
        "point 128; uint8 with zero point 0 is",
        "  Conv third runs as Conv: no QuantizeLinear on its output, which is an output of the graph",
    ]
    assert [op.name for op in report.integer_ops] == ["first"]
    assert [op.module for op in report.float_with_qdq] == ["body.0.conv", ""]


def test_the_report_counts_what_is_folded_and_float(tmp_path):
    path = save(tmp_path / "m.onnx", "image", "d = Mul(wf, s) y = Conv(x, d)")
    assert str(inspect_onnx(path)).splitlines()[1:] == [
        "  0 of 1 Conv run as integers, 1 in floats",
        "  0 of 1 Mul run as integers, 1 folded",
    ]


def test_a_file_without_such_ops(tmp_path):
    report = inspect_onnx(save(tmp_path / "m.onnx", "image", "y = Tanh(x)"))
    assert report.ops == ()
    assert str(report) == f"{tmp_path / 'm.onnx'} in ONNX Runtime CPU:"


@pytest.mark.parametrize("content", [None, b"", b"not an ONNX file", b"\x08"], ids=["none", "empty", "text", "cut"])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValidationError, match=f"^{re.escape(str(path))}: expected an ONNX file"):
        inspect_onnx(path)


def test_a_file_that_onnxruntime_cannot_load_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", "image", "y = own.Unheard(x)")
    proto = onnx.load(path)
    proto.opset_import.append(
        onnx.parser.parse_model('<ir_version: 10, opset_import: ["own": 1]> g () => () {}').opset_import[0]
    )
    onnx.save(proto, path)
    with pytest.raises(ValidationError, match=f"^{re.escape(str(path))}: onnxruntime cannot load it: .*Unheard"):
        inspect_onnx(path)
