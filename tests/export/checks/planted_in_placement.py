"""Faults planted in ops, and in where pairs stand between them: each graph breaks its rule, and no other."""

from graph_texts import ATTENTION, CONCAT, CONV, INITIALIZERS, PAIR, RESIDUAL, SAME, WEIGHT, X, Y, graph, swap
from planted import planted

OPERATORS = [
    planted(
        "error R12 integer_operator | dynamic | DynamicQuantizeLinear",
        graph(X, "uint8[1, 16, 8, 8] y, float t, uint8 u", "y, t, u = DynamicQuantizeLinear(x)"),
    ),
    planted(
        "error R12 integer_operator | QLinear | QLinearMatMul",
        graph("int8[4, 32] x", "int8[4, 16] y", "y = QLinearMatMul(x, s, z, m, s, z, s2, z)"),
    ),
    planted(
        "error R12 integer_operator | integers | MatMulInteger",
        graph("int8[4, 32] x", "int32[4, 16] y", "y = MatMulInteger(x, m)"),
    ),
    planted(
        "error R12 integer_operator | contrib | com.microsoft::QuantizeLinear",
        graph(X, "int8[1, 16, 8, 8] y", "y = com.microsoft.QuantizeLinear(x, s, z)"),
    ),
    planted(
        "error R17 refused_form | indices | Indices",
        graph(
            X,
            "float[1, 16, 4, 4] y, int64[1, 16, 4, 4] i",
            "y, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)",
        ),
    ),
    planted(
        "error R17 refused_form | indices for MaxUnpool | Indices",
        graph(
            X,
            Y,
            "p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)"
            " y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(p, i)",
        ),
    ),
    planted(
        "error R17 refused_form | layout | layout",
        graph(
            "float[2, 3, 4] x, float[1, 20, 4] w, float[1, 20, 5] r",
            "float[2, 3, 1, 5] y",
            "y = LSTM<hidden_size = 5, layout = 1>(x, w, r)",
            "float s = {1}",
        ),
    ),
    planted(
        "error R17 refused_form | training | training_mode",
        graph(
            X,
            f"{Y}, float[16] mean, float[16] var",
            "y, mean, var = BatchNormalization<training_mode = 1>(x, b, b, b, b)",
        ),
    ),
    planted(
        "error R17 computes_in_uint8 | pool | uint8",
        graph("uint8[1, 16, 8, 8] x", "uint8[1, 16, 7, 7] y", "y = MaxPool<kernel_shape = [2, 2]>(x)"),
    ),
    planted(
        "warning R46 quantized_recurrent_layer | LSTM | 1 of its inputs",
        graph(
            "float[2, 3, 4] x, float[1, 20, 4] w, float[1, 20, 5] r",
            "float[2, 1, 3, 5] y",
            f"{PAIR} y = LSTM<hidden_size = 5>(d, w, r)",
            "float s = {0.1}, int8 z = {0}",
        ),
    ),
    planted("info R48 custom_operator | name of another | mine::QLinearConv", graph(X, Y, "y = mine.QLinearConv(x)")),
    planted(
        "info R48 custom_operator | two of one | mine::Special", graph(X, Y, "a = mine.Special(x) y = mine.Special(a)")
    ),
]

PLACEMENT = [
    planted(
        "warning R32 pair_inside_a_fusion | Relu | Relu right behind Conv",
        swap(
            CONV,
            ("y =", "c ="),
            ("wd, b)", "wd, b) cq = QuantizeLinear(c, s2, z) cd = DequantizeLinear(cq, s2, z) y = Relu(cd)"),
        ),
    ),
    planted("warning R33 float_skip | x | expected Q/DQ on the skip", swap(RESIDUAL, ("Add(r, d)", "Add(r, x)"))),
    planted(
        "warning R33 float_skip | Relu behind the add | expected Q/DQ on the skip",
        swap(RESIDUAL, ("a = Add(r, d)", "ra = Add(r, x) a = Relu(ra)")),
    ),
    planted(
        "warning R33 float_skip | two convolutions | expected Q/DQ on the skip",
        swap(RESIDUAL, ("a = Add(r, d)", f"c2 = Conv<{SAME}>(d, wd, b) a = Add(r, c2)")),
    ),
    planted(
        "warning R33 both_operands_quantized | both | on both operands",
        swap(
            RESIDUAL, ("a = Add(r, d)", "rq = QuantizeLinear(r, s2, z) rd = DequantizeLinear(rq, s2, z) a = Add(rd, d)")
        ),
    ),
    planted(
        "warning R34 unequal_quantizers | two scales | INT8 with 0.1 and INT8 with 0.2",
        graph(
            X,
            f"{Y}, float[1, 16, 8, 8] y2",
            f"{PAIR} {WEIGHT} q2 = QuantizeLinear(x, s2, z) d2 = DequantizeLinear(q2, s2, z)"
            f" y = Conv<{SAME}>(d, wd) y2 = Conv<{SAME}>(d2, wd)",
        ),
    ),
    planted(
        "warning R34 unequal_quantizers | two types | INT8 with 0.1 and INT4 with 0.1",
        graph(
            X,
            f"{Y}, float[1, 16, 8, 8] d",
            f"{PAIR} q2 = QuantizeLinear<output_dtype = 22>(x, s) y = DequantizeLinear(q2, s)",
        ),
        21,
    ),
    planted(
        "warning R35 quantized_on_one_side | average | float output",
        graph(X, "float[1, 16, 1, 1] y", f"{PAIR} y = GlobalAveragePool(d)"),
    ),
    planted(
        "warning R35 quantized_on_one_side | one operand | got x2 in float",
        graph(f"{X}, float[1, 16, 8, 8] x2", Y, f"{PAIR} y = Mul(d, x2)"),
    ),
    planted(
        "warning R35 quantized_on_one_side | product behind a convolution | got c in float",
        graph(X, Y, f"{PAIR} {WEIGHT} c = Conv<{SAME}>(d, wd, b) y = Mul(d, c)"),
    ),
    planted(
        "warning R36 rescaled_move | MaxPool | MaxPool on both sides, got 0.1, 0.2",
        graph(
            X,
            "float[1, 16, 7, 7] y",
            f"{PAIR} p = MaxPool<kernel_shape = [2, 2]>(d)"
            " q2 = QuantizeLinear(p, s2, z) y = DequantizeLinear(q2, s2, z)",
        ),
    ),
    planted(
        "warning R36 rescaled_move | nothing between | a pair behind a pair",
        graph(X, Y, f"{PAIR} q2 = QuantizeLinear(d, s2, z) y = DequantizeLinear(q2, s2, z)"),
    ),
    planted(
        "warning R37 rescaled_concat | inputs | got 0.1, 0.2",
        swap(CONCAT, ("(x2, s,", "(x2, s2,"), ("(q2, s,", "(q2, s2,")),
    ),
    planted(
        "warning R37 rescaled_concat | output | got 0.1, 0.2",
        swap(CONCAT, ("(c, s,", "(c, s2,"), ("(q3, s,", "(q3, s2,")),
    ),
    planted(
        "warning R38 pair_behind_a_pad | Conv | between Pad and Conv",
        graph(
            "float[1, 16, 6, 6] x0",
            "float[1, 16, 6, 6] y",
            f"x = Pad(x0, p) {PAIR} {WEIGHT} y = Conv<kernel_shape = [3, 3]>(d, wd)",
            f"{INITIALIZERS}, int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}",
        ),
    ),
    planted("warning R41 pair_inside_a_norm | Softmax | Softmax in float", graph(X, Y, f"{PAIR} y = Softmax(d)")),
    planted(
        "warning R41 pair_inside_a_norm | LayerNorm | LayerNormalization in float",
        graph("float[1, 4, 16] x", "float[1, 4, 16] y", f"{PAIR} y = LayerNormalization(d, b, b)"),
    ),
    planted(
        "warning 1f quantize_without_dequantize | output | no reader",
        graph(X, "int8[1, 16, 8, 8] y", "y = QuantizeLinear(x, s, z)"),
    ),
    planted(
        "warning 1f quantize_without_dequantize | Cast | got Cast of y",
        graph(X, Y, "q = QuantizeLinear(x, s, z) y = Cast<to = 1>(q)"),
    ),
]

ATTENTIONS = [
    planted(
        "warning R42 quantized_but_not_fused | mask as the first operand | a mask",
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pm = Add(mask, p) t = Softmax<axis = -1>(pm)")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | late factor as the first operand | a factor",
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pm = Mul(s, p) t = Softmax<axis = -1>(pm)")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | late division and constant mask | a factor",
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pd = Div(p, s) pm = Add(s2, pd) t = Softmax<axis = -1>(pm)")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | mask, first product only | a mask",
        swap(
            ATTENTION,
            ("t = Softmax<axis = -1>(p)", "pm = Add(p, mask) t = Softmax<axis = -1>(pm)"),
            ("(td, vd)", "(t, v)"),
        ),
    ),
    planted(
        "warning R42 quantized_but_not_fused | moved between | a mask",
        swap(
            ATTENTION, ("t = Softmax<axis = -1>(p)", "pi = Identity(p) pm = Add(pi, mask) t = Softmax<axis = -1>(pm)")
        ),
    ),
    planted(
        "warning R42 quantized_but_not_fused | mask | a mask",
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pm = Add(p, mask) t = Softmax<axis = -1>(pm)")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | late factor | a factor",
        swap(ATTENTION, ("t = Softmax<axis = -1>(p)", "pm = Mul(p, s) t = Softmax<axis = -1>(pm)")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | long | 513 positions",
        swap(ATTENTION, ("[2, 4, 32, 16]", "[2, 4, 513, 16]"), ("[2, 4, 16, 32]", "[2, 4, 16, 513]")),
    ),
    planted(
        "warning R42 quantized_but_not_fused | second product only | q and k in float",
        swap(ATTENTION, ("MatMul(d, kd)", "MatMul(x, k)")),
    ),
]
