"""Graphs that are as TensorRT wants them: no finding, and no note."""

import pytest
from graph_texts import (
    ATTENTION,
    CONCAT,
    CONV,
    FLOAT_ATTENTION,
    INITIALIZERS,
    PAIR,
    PRODUCT,
    RESIDUAL,
    SAME,
    WEIGHT,
    X,
    Y,
    added,
    graph,
    swap,
)

SECOND = f"q2 = QuantizeLinear(a, s2, z) d2 = DequantizeLinear(q2, s2, z) y = Conv<{SAME}>(d2, wd, b)"
GATE = "g = GlobalAveragePool(r) h = Conv<kernel_shape = [1, 1]>(g, f) i = HardSigmoid(h)"

GOOD = {
    "conv": CONV,
    "float weight with Q and DQ": added(
        swap(CONV, (WEIGHT, "wq = QuantizeLinear<axis = 0>(f, ws, wz) wd = DequantizeLinear<axis = 0>(wq, ws, wz)")),
        "float[16, 16, 3, 3] f = {0.1...}",
    ),
    "weight per tensor": swap(CONV, ("<axis = 0>(w, ws, wz)", "(w, s, z)")),
    "weight per tensor with an axis, as torch writes it": swap(CONV, ("<axis = 0>(w, ws, wz)", "<axis = 1>(w, s, z)")),
    "scale of one element": swap(CONV, ("float s = {0.1}", "float[1] s = {0.1}"), ("int8 z =", "int8[1] z =")),
    "int8 without a zero point on DQ": swap(CONV, ("(w, ws, wz)", "(w, ws)")),
    "zero point by Cast": added(
        swap(CONV, ("int8 z = {0},", ""), ("q =", "z = Cast<to = 3>(zf) q =")),
        "float zf = {0.0}",
    ),
    "parameters of Constant nodes": swap(
        CONV,
        ("float s = {0.1},", ""),
        ("int8 z = {0},", ""),
        ("q =", "s = Constant<value = float {0.1}>() z = Constant<value = int8 {0}>() q ="),
    ),
    "shared initializer behind Identity": swap(CONV, ("q =", "si = Identity(s) q ="), ("(q, s, z)", "(q, si, z)")),
    "BatchNorm and Relu": swap(
        CONV, ("y =", "c ="), ("wd, b)", "wd, b) n = BatchNormalization(c, b, b, b, ws) y = Relu(n)")
    ),
    "SiLU between": graph(X, Y, f"{PAIR} {WEIGHT} c = Conv<{SAME}>(d, wd, b) t = Sigmoid(c) a = Mul(c, t) {SECOND}"),
    "residual": RESIDUAL,
    "residual without a convolution": graph(f"{X}, float[1, 16, 8, 8] x2", Y, f"{WEIGHT} a = Add(x, x2) {SECOND}"),
    "one pair for two readers": graph(
        X, f"{Y}, float[1, 16, 8, 8] y2", f"{PAIR} {WEIGHT} y = Conv<{SAME}>(d, wd) y2 = Conv<{SAME}>(d, wd)"
    ),
    "equal pairs on one tensor": graph(
        X,
        f"{Y}, float[1, 16, 8, 8] y2",
        f"{PAIR} {WEIGHT} q2 = QuantizeLinear(x, s, z) d2 = DequantizeLinear(q2, s, z)"
        f" y = Conv<{SAME}>(d, wd) y2 = Conv<{SAME}>(d2, wd)",
    ),
    "concat": CONCAT,
    "concat of pairs right in front of a convolution": swap(
        CONCAT,
        ("q3 = QuantizeLinear(c, s, z) d3 = DequantizeLinear(q3, s, z)", ""),
        ("(d3, wd, b)", "(c, wd, b)"),
    ),
    "concat in float": graph(
        f"{X}, float[1, 16, 8, 8] x2",
        Y,
        f"c = Concat<axis = 1>(x, x2) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z)"
        f" wd = DequantizeLinear<axis = 0>(w2, ws, wz) y = Conv<{SAME}>(d, wd, b)",
        f"{INITIALIZERS}, int8[16, 32, 3, 3] w2 = {{1...}}",
    ),
    "max pool between pairs of one scale": graph(
        X,
        "float[1, 16, 7, 7] y",
        f"{PAIR} {WEIGHT} p = MaxPool<kernel_shape = [2, 2]>(d)"
        f" q2 = QuantizeLinear(p, s, z) d2 = DequantizeLinear(q2, s, z) y = Conv<{SAME}>(d2, wd)",
    ),
    "max pool behind DQ": graph(
        X, "float[1, 16, 7, 7] y", f"{PAIR} {WEIGHT} p = MaxPool<kernel_shape = [2, 2]>(d) y = Conv<{SAME}>(p, wd)"
    ),
    "Pad behind DQ": graph(
        "float[1, 16, 6, 6] x",
        "float[1, 16, 6, 6] y",
        f"{PAIR} {WEIGHT} e = Pad(d, p) y = Conv<kernel_shape = [3, 3]>(e, wd)",
        f"{INITIALIZERS}, int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}",
    ),
    "reflecting Pad in front of Q": graph(
        "float[1, 16, 6, 6] x0",
        "float[1, 16, 6, 6] y",
        f"""x = Pad<mode = "reflect">(x0, p) {PAIR} {WEIGHT} y = Conv<kernel_shape = [3, 3]>(d, wd)""",
        f"{INITIALIZERS}, int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}",
    ),
    "average between pairs": graph(X, Y, f"{PAIR} {WEIGHT} a = AveragePool<{SAME}>(d) {SECOND}"),
    "squeeze and excite": graph(
        X,
        Y,
        f"x0 = Relu(x) {swap(PAIR, ('(x,', '(x0,'))} {WEIGHT} c = Conv<{SAME}>(d, wd, b) r = Relu(c) {GATE}"
        f" rq = QuantizeLinear(r, s, z) rd = DequantizeLinear(rq, s, z) a = Mul(rd, i) {SECOND}",
        f"{INITIALIZERS}, float[16, 16, 1, 1] f = {{0.1...}}",
    ),
    "small layer in float": graph(
        X,
        "float[1, 4, 8, 6] y",
        f"{PAIR} {WEIGHT} c = Conv<{SAME}>(d, wd, b) y = Conv<kernel_shape = [1, 3]>(c, f)",
        f"{INITIALIZERS}, float[4, 16, 1, 3] f = {{0.1...}}",
    ),
    "depthwise": graph(
        "float[1, 8, 8, 8] x0",
        "float[1, 8, 6, 6] y",
        f"x = Relu(x0) {PAIR} wd = DequantizeLinear<axis = 0>(f, fs) y = Conv<kernel_shape = [3, 3], group = 8>(d, wd)",
        f"{INITIALIZERS}, int8[8, 1, 3, 3] f = {{1...}}, float[8] fs = {{0.1...}}",
    ),
    "grouped": graph(
        "float[1, 32, 8, 8] x",
        "float[1, 16, 6, 6] y",
        f"{PAIR} {WEIGHT} y = Conv<kernel_shape = [3, 3], group = 2>(d, wd, b)",
    ),
    "first convolution of an image": graph(
        "uint8[1, 3, 8, 8] i",
        "float[1, 16, 6, 6] y",
        f"x = Cast<to = 1>(i) {PAIR} wd = DequantizeLinear<axis = 0>(f, ws) y = Conv<kernel_shape = [3, 3]>(d, wd)",
        f"{INITIALIZERS}, int8[16, 3, 3, 3] f = {{1...}}",
    ),
    "transposed, per tensor": swap(CONV, ("Conv<", "ConvTranspose<"), ("<axis = 0>(w, ws, wz)", "(w, s, z)")),
    "transposed, per output channel": swap(CONV, ("Conv<", "ConvTranspose<"), ("<axis = 0>", "<axis = 1>")),
    "MatMul": PRODUCT,
    "Gemm of a linear layer": swap(
        PRODUCT, ("<axis = 1>(m, ws, wz)", "<axis = 0>(mt, ws, wz)"), ("MatMul(d, wd)", "Gemm<transB = 1>(d, wd, b)")
    ),
    "Gemm with a weight as it is": swap(PRODUCT, ("MatMul(", "Gemm("), ("<axis = 1>", "<axis = -1>")),
    "attention": ATTENTION,
    "attention with a constant mask": added(
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pm = Add(p, c) t = Softmax<axis = -1>(pm)")),
        "float[32, 32] c = {0.0...}",
    ),
    "attention with a mask, in float": FLOAT_ATTENTION,
    "LayerNorm behind a convolution": graph(
        X,
        Y,
        f"{PAIR} {WEIGHT} c = Conv<{SAME}>(d, wd) cq = QuantizeLinear(c, s2, z) cd = DequantizeLinear(cq, s2, z)"
        " y = LayerNormalization<axis = 3>(cd, o, o)",
        f"{INITIALIZERS}, float[8] o = {{1.0...}}",
    ),
    "Softmax of constants": graph(X, Y, f"{WEIGHT} e = Softmax(wd) o = ReduceMean<keepdims = 0>(e) y = Mul(x, o)"),
    "activation behind a pair on a pool": graph(
        X,
        "float[1, 16, 7, 7] y",
        "p = MaxPool<kernel_shape = [2, 2]>(x) q = QuantizeLinear(p, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)",
    ),
    "DQ in front of a Cast to integers": graph(X, "int32[1, 16, 8, 8] y", f"{PAIR} y = Cast<to = 6>(d)"),
    "sum of int8 inputs": graph(
        "int8[1, 16, 8, 8] x, int8[1, 16, 8, 8] x2",
        Y,
        f"{WEIGHT} d = DequantizeLinear(x, s, z) d1 = DequantizeLinear(x2, s2, z) a = Add(d, d1) {SECOND}",
    ),
    "first convolution of an image with channels last": graph(
        "float[1, 8, 8, 3] i",
        "float[1, 8, 6, 6] y",
        f"x = Transpose<perm = [0, 3, 1, 2]>(i) {PAIR}"
        " wd = DequantizeLinear(f, s) y = Conv<kernel_shape = [3, 3]>(d, wd)",
        f"{INITIALIZERS}, int8[8, 3, 3, 3] f = {{1...}}",
    ),
    "residual of a float convolution": graph(
        X,
        Y,
        f"{WEIGHT} r = Conv<kernel_shape = [1, 3], pads = [0, 1, 0, 1], group = 16>(x, f) a = Add(r, x) {SECOND}",
        f"{INITIALIZERS}, float[16, 1, 1, 3] f = {{0.1...}}",
    ),
    "float concat with two ranges behind": graph(
        f"{X}, float[1, 16, 8, 8] x2",
        "float[1, 32, 8, 8] y, float[1, 32, 7, 7] y2",
        "c = Concat<axis = 1>(x, x2) q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z)"
        " p = MaxPool<kernel_shape = [2, 2]>(c) q2 = QuantizeLinear(p, s2, z) y2 = DequantizeLinear(q2, s2, z)",
    ),
    "sum of two pairs": graph(
        f"{X}, float[1, 16, 8, 8] x2",
        Y,
        f"{PAIR} {WEIGHT} q1 = QuantizeLinear(x2, s2, z) d1 = DequantizeLinear(q1, s2, z) a = Add(d, d1) {SECOND}",
    ),
    "no quantizer": graph(X, Y, f"y = Conv<{SAME}>(x, f)", "float[16, 16, 3, 3] f = {0.1...}"),
    "float16": graph(
        "float16[4, 32] x",
        "float16[4, 16] y",
        f"s = Cast<to = 10>(s32) ws = Cast<to = 10>(ws32) {PAIR}"
        " wd = DequantizeLinear<axis = 1>(m, ws) y = MatMul(d, wd)",
        "float s32 = {0.1}, int8 z = {0}, int8[32, 16] m = {1...}, float[16] ws32 = {0.1...}",
    ),
}
GOOD_21 = {
    "int4 weight alone": graph(
        "float[4, 32] x", "float[4, 16] y", "c = Cast<to = 22>(m) wd = DequantizeLinear(c, s) y = MatMul(x, wd)"
    ),
    "blocks of a tensor of any size": graph(
        "float[N, 32] x",
        "float[N, 32] y",
        "q = QuantizeLinear<output_dtype = 22>(x, bs) y = DequantizeLinear(q, bs)",
        "float[2, 32] bs = {0.1...}",
    ),
    "int4 weight in blocks": graph(
        "float[4, 32] x",
        "float[4, 16] y",
        "c = Cast<to = 22>(m) wd = DequantizeLinear<axis = 0, block_size = 16>(c, bs) y = MatMul(x, wd)",
        f"{INITIALIZERS}, float[2, 16] bs = {{0.1...}}",
    ),
}
UNDECIDED = {
    "batch of any size": swap(CONV, ("[1, 16, 8, 8]", "[N, 16, 8, 8]")),
    "residual of any size": swap(RESIDUAL, ("[1, 16, 8, 8]", "[N, 16, H, W]")),
    "operands that may be broadcast": graph(
        "float[N, 16, H, W] x, float[M, 16, K, L] x2", "float[A, 16, B, C] y", f"{PAIR} y = Mul(d, x2)"
    ),
    "residual of unnamed size": swap(swap(RESIDUAL, ("[1, 16, 8, 8]", "[?, 16, ?, ?]")), ("Add(r, d)", "Add(r, x)")),
    "attention of any length": swap(
        ATTENTION, ("[2, 4, 32, 16]", "[2, 4, L, 16]"), ("[2, 4, 16, 32]", "[2, 4, 16, L]")
    ),
    "weight of any size": graph(
        "float[4, K] x, float[K, N] m",
        "float[4, N] y",
        f"{PAIR} mq = QuantizeLinear(m, s, z) md = DequantizeLinear(mq, s, z) y = MatMul(d, md)",
        "float s = {0.1}, int8 z = {0}",
    ),
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in (GOOD | UNDECIDED).items()])
def test_there_is_no_finding(check, text):
    report = check(text)
    assert (report.findings, report.notes) == ((), ())


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in GOOD_21.items()])
def test_there_is_no_finding_in_opset_21(check, text):
    report = check(text, 21)
    assert (report.findings, report.notes) == ((), ())
