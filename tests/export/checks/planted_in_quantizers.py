"""Faults planted in the parameters and types of Q and DQ: each graph breaks its rule, and no other."""

from graph_texts import CONV, PAIR, PRODUCT, X, added, graph, swap
from planted import planted

ZERO_POINTS = [
    planted("error R1 nonzero_zero_point | activation | got 3", swap(CONV, ("z = {0},", "z = {3},"))),
    planted(
        "error R1 nonzero_zero_point | one channel | got -1 (16 of 16", swap(CONV, ("wz = {0...}", "wz = {-1...}"))
    ),
    planted(
        "error R1 nonzero_zero_point | by Cast | got 3",
        added(swap(CONV, ("int8 z = {0},", ""), ("q =", "z = Cast<to = 3>(zf) q =")), "float zf = {3.0}"),
    ),
    planted(
        "error R1 computed_zero_point | input | constant zero point, got z",
        swap(CONV, (f"({X})", f"({X}, int8 z)"), (" int8 z = {0},", "")),
    ),
    planted("error R6 zero_point_of_another_size | two | [2]", swap(CONV, ("int8 z = {0}", "int8[2] z = {0...}"))),
    planted(
        "error R6 quantize_without_a_type | Q | uint8", swap(CONV, ("(x, s, z)", "(x, s)"), ("(q, s, z)", "(q, s)"))
    ),
]

SCALES = [
    planted("error R4 bad_scale | zero | got 0 (1 of 1", swap(CONV, ("float s = {0.1}", "float s = {0.0}"))),
    planted("error R4 bad_scale | negative | got -0.1", swap(CONV, ("float s = {0.1}", "float s = {-0.1}"))),
    planted("error R4 bad_scale | channel | (16 of 16", swap(CONV, ("ws = {0.1...}", "ws = {0.0...}"))),
    planted(
        "error R4 bad_scale | none | at least one",
        swap(CONV, ("float s = {0.1}", "float[0] s = {}"), ("int8 z = {0}", "int8[0] z = {}")),
    ),
    planted("error R4 scale_of_another_type | double | float64", swap(CONV, ("float s = {0.1}", "double s = {0.1}"))),
    planted(
        "error R5 computed_scale | input | got s, which depends",
        swap(CONV, (f"({X})", f"({X}, float s)"), ("float s = {0.1},", "")),
    ),
    planted(
        "error R7 scale_does_not_fit | size | expected 16 scales for axis 0",
        swap(CONV, ("float[16] ws", "float[15] ws"), ("int8[16] wz", "int8[15] wz")),
    ),
    planted("error R7 scale_does_not_fit | no axis | got none", swap(CONV, ("<axis = 0>", ""))),
    planted("error R7 scale_does_not_fit | axis | got 5", swap(CONV, ("<axis = 0>", "<axis = 5>"))),
    planted(
        "error R7 scale_does_not_fit | scalar data | a scalar", graph("float x", "float y", swap(PAIR, ("d =", "y =")))
    ),
    planted(
        "error R8 activation_per_channel | Q and DQ | got 16",
        swap(
            CONV, ("Linear(x, s, z)", "Linear<axis = 1>(x, ws, wz)"), ("Linear(q, s, z)", "Linear<axis = 1>(q, ws, wz)")
        ),
    ),
    planted(
        "error R9 bad_blocks | int8 | got blocks",
        added(
            swap(PRODUCT, ("<axis = 1>(m, ws, wz)", "<axis = 0, block_size = 16>(m, bs)")), "float[2, 16] bs = {0.1...}"
        ),
        21,
    ),
    planted(
        "error R9 bad_blocks | first of three | one of the last two",
        graph(
            "float[4, 8, 8] x",
            "float[4, 8, 8] y",
            "q = QuantizeLinear<output_dtype = 22>(x, bs) y = DequantizeLinear(q, bs)",
            "float[2, 8, 8] bs = {0.1...}",
        ),
        21,
    ),
    planted(
        "error R9 bad_blocks | two dimensions | equal blocks",
        graph(
            "float[4, 32] x",
            "float[4, 32] y",
            "q = QuantizeLinear<output_dtype = 22>(x, bs) y = DequantizeLinear(q, bs)",
            "float[2, 2] bs = {0.1...}",
        ),
        21,
    ),
]

CODES = [
    planted("error R2 unknown_codes | uint8 | UINT8", swap(CONV, ("int8 z = {0}", "uint8 z = {0}"))),
    planted(
        "error R2 unknown_codes | stored | UINT8",
        swap(CONV, ("int8[16, 16", "uint8[16, 16"), ("int8[16] wz", "uint8[16] wz")),
    ),
    planted("error R2 unknown_codes | int16 | INT16", swap(CONV, ("int8 z = {0}", "int16 z = {0}")), 21),
    planted(
        "error R3 int32_dequantized | bias | float bias, got ib",
        added(
            swap(CONV, ("y =", "bd = DequantizeLinear<axis = 0>(ib, ws) y ="), ("wd, b)", "wd, bd)")),
            "int32[16] ib = {5...}",
        ),
    ),
    planted(
        "error R10 odd_number_of_four_bits | 5 x 3 | [5, 3]",
        graph(
            "float[5, 3] x", "float[5, 3] y", "q = QuantizeLinear<output_dtype = 22>(x, s) y = DequantizeLinear(q, s)"
        ),
        21,
    ),
    planted(
        "error R11 contradicting_output_type | Q | UINT8", swap(CONV, ("Linear(x,", "Linear<output_dtype = 2>(x,")), 21
    ),
    planted(
        "error R11 contradicting_output_type | DQ | DOUBLE",
        swap(CONV, ("Linear(q,", "Linear<output_dtype = 11>(q,")),
        23,
    ),
]
