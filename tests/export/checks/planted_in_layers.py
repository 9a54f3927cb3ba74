"""Faults planted in weights, convolutions and products: each graph breaks its rule, and no other."""

from graph_texts import CONCAT, CONV, INITIALIZERS, PAIR, PRODUCT, SAME, WEIGHT, X, Y, added, graph, swap
from planted import planted

WEIGHTS = [
    planted("error 1c wrong_channel_axis | Conv | along axis 0, got axis 1", swap(CONV, ("<axis = 0>", "<axis = 1>"))),
    planted(
        "error 1c wrong_channel_axis | MatMul | along axis 1, got axis 0",
        swap(PRODUCT, ("<axis = 1>(m, ws, wz)", "<axis = 0>(m, ms, mz)")),
    ),
    planted(
        "error 1c wrong_channel_axis | Gemm | along axis 0, got axis 1",
        swap(PRODUCT, ("(m, ws, wz)", "(mt, ms, mz)"), ("MatMul(", "Gemm<transB = 1>(")),
    ),
    planted(
        "error 1c wrong_channel_axis | negative | along axis 0, got axis 1",
        swap(PRODUCT, ("<axis = 1>(m, ws, wz)", "<axis = -1>(mt, ms, mz)"), ("MatMul(", "Gemm<transB = 1>(")),
    ),
    planted(
        "error 1c wrong_channel_axis | ConvTranspose | along axis 1, got axis 0",
        swap(CONV, ("Conv<", "ConvTranspose<")),
    ),
    planted(
        "error 1c wrong_channel_axis | grouped ConvTranspose | grouped ConvTranspose",
        added(
            swap(CONV, ("<axis = 0>(w, ws, wz)", "<axis = 1>(wg, gs, gz)"), ("Conv<", "ConvTranspose<group = 2, ")),
            "int8[16, 8, 3, 3] wg = {1...}, float[8] gs = {0.1...}, int8[8] gz = {0...}",
        ),
    ),
    planted(
        "warning 1c quantized_embedding | Gather | got m behind",
        graph("int64[4] x", "float[4, 16] y", "wd = DequantizeLinear<axis = 1>(m, ws, wz) y = Gather(wd, x)"),
    ),
    planted("error R14 kernel_shape_missing | Conv | kernel_shape", swap(CONV, ("kernel_shape = [3, 3], ", ""))),
    planted(
        "warning R15 one_dimensional_convolution | Conv | [16, 16, 3]",
        graph(
            "float[1, 16, 8] x",
            "float[1, 16, 6] y",
            f"{PAIR} {WEIGHT} y = Conv<kernel_shape = [3]>(d, wd)",
            INITIALIZERS.replace("[16, 16, 3, 3]", "[16, 16, 3]"),
        ),
    ),
    planted(
        "warning R16 op_behind_weight | Transpose | got Transpose between",
        swap(PRODUCT, ("<axis = 1>(m,", "<axis = 0>(mt,"), ("y =", "t = Transpose(wd) y ="), ("(d, wd)", "(d, t)")),
    ),
    planted(
        "warning R16 op_behind_weight | Cast | got Cast between",
        swap(PRODUCT, ("y =", "t = Cast<to = 1>(wd) y ="), ("(d, wd)", "(d, t)")),
    ),
    planted(
        "warning R16 op_behind_weight | two | got Identity, Transpose between",
        swap(
            PRODUCT,
            ("<axis = 1>(m,", "<axis = 0>(mt,"),
            ("y =", "t = Transpose(wd) u = Identity(t) y ="),
            ("(d, wd)", "(d, u)"),
        ),
    ),
    planted(
        "error R16 four_bits_quantized_at_run_time | MatMul | stored as INT4",
        graph(
            "float[4, 32] x",
            "float[4, 16] y",
            "wq = QuantizeLinear<output_dtype = 22>(f, s) wd = DequantizeLinear(wq, s) y = MatMul(x, wd)",
            "float s = {0.1}, float[32, 16] f = {0.1...}",
        ),
        21,
    ),
]

LAYERS = [
    planted(
        "warning R20 cast_beside_a_pair | behind DQ | FLOAT to FLOAT16",
        graph(X, "float16[1, 16, 8, 8] y", f"{PAIR} y = Cast<to = 10>(d)"),
    ),
    planted(
        "warning R20 cast_beside_a_pair | between DQ and MatMul | FLOAT to FLOAT16",
        swap(PRODUCT, ("y =", "t = Cast<to = 10>(d) y ="), ("(d, wd)", "(t, wd)")),
    ),
    planted(
        "warning R20 cast_beside_a_pair | in front of Q | FLOAT16 to FLOAT",
        graph("float16[1, 16, 8, 8] h", Y, f"x = Cast<to = 1>(h) {swap(PAIR, ('d =', 'y ='))}"),
    ),
    planted("warning R30 one_quantized_input | no data | not on its data", swap(CONV, ("(d, wd, b)", "(x, wd, b)"))),
    planted(
        "warning R30 one_quantized_input | no weight | not on its weight",
        added(swap(CONV, ("(d, wd, b)", "(d, f, b)")), "float[16, 16, 3, 3] f = {0.1...}"),
    ),
    planted(
        "warning R30 one_quantized_input | product | second input",
        graph("float[4, 32] x, float[32, 16] k", "float[4, 16] y", f"{PAIR} y = MatMul(d, k)"),
    ),
    planted(
        "warning R30 one_quantized_input | half of a Concat | not on its data",
        swap(
            CONCAT,
            ("Concat<axis = 1>(d, d2)", "Concat<axis = 1>(d, x2)"),
            ("(d3, wd, b)", "(c, wd, b)"),
            ("q3 = QuantizeLinear(c, s, z) d3 = DequantizeLinear(q3, s, z)", ""),
        ),
    ),
    planted(
        "info R30 float_layer | Conv | runs in float",
        added(
            swap(CONV, ("y =", "c ="), ("wd, b)", f"wd, b) y = Conv<{SAME}>(c, f)")), "float[16, 16, 3, 3] f = {0.1...}"
        ),
    ),
    planted(
        "warning R43 small_quantized_product | Gemm | 32 inputs, 10 outputs",
        swap(
            PRODUCT,
            ("int8[32, 16] m", "int8[10, 32] m"),
            ("[4, 16] y", "[4, 10] y"),
            ("<axis = 1>(m, ws, wz)", "(m, s, z)"),
            ("MatMul(", "Gemm<transB = 1>("),
        ),
    ),
    planted(
        "warning R43 small_quantized_product | vector | matrix-vector",
        swap(
            PRODUCT,
            ("int8[32, 16] m", "int8[32, 1] m"),
            ("[4, 16] y", "[4, 1] y"),
            ("<axis = 1>(m, ws, wz)", "(m, s, z)"),
        ),
    ),
    planted(
        "warning R44 small_quantized_convolution | second | 8 input channels a group, 8 outputs",
        graph(
            "float[1, 8, 8, 8] x0",
            "float[1, 8, 6, 6] y",
            f"x = Relu(x0) {PAIR} wd = DequantizeLinear(w8, s, z) y = Conv<kernel_shape = [3, 3]>(d, wd)",
            f"{INITIALIZERS}, int8[8, 8, 3, 3] w8 = {{1...}}",
        ),
    ),
    planted(
        "warning R44 small_quantized_convolution | first | 3 input channels a group, 12 outputs",
        graph(
            "float[1, 3, 8, 8] x",
            "float[1, 12, 6, 6] y",
            f"{PAIR} wd = DequantizeLinear(w3, s, z) y = Conv<kernel_shape = [3, 3]>(d, wd)",
            f"{INITIALIZERS}, int8[12, 3, 3, 3] w3 = {{1...}}",
        ),
    ),
    planted(
        "warning R44 small_quantized_convolution | transposed | 4 input channels a group, 16 outputs",
        graph(
            "float[1, 16, 8, 8] x",
            "float[1, 16, 9, 9] y",
            f"{PAIR} wd = DequantizeLinear(wt, s, z) y = ConvTranspose<kernel_shape = [2, 2], group = 4>(d, wd)",
            f"{INITIALIZERS}, int8[16, 4, 2, 2] wt = {{1...}}",
        ),
    ),
]
