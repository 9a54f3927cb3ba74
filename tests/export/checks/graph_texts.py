"""Texts of graphs: the pieces that planted faults and good graphs are made of."""

INITIALIZERS = """
    float s = {0.1}, float s2 = {0.2}, int8 z = {0},
    int8[16, 16, 3, 3] w = {1...}, float[16] ws = {0.1...}, int8[16] wz = {0...}, float[16] b = {0.0...},
    int8[32, 16] m = {1...}, int8[16, 32] mt = {1...}, float[32] ms = {0.1...}, int8[32] mz = {0...}
"""
X = "float[1, 16, 8, 8] x"
Y = "float[1, 16, 8, 8] y"
PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "wd = DequantizeLinear<axis = 0>(w, ws, wz)"
SAME = "kernel_shape = [3, 3], pads = [1, 1, 1, 1]"


def graph(inputs: str, outputs: str, nodes: str, initializers: str = INITIALIZERS) -> str:
    """Return the text of a graph."""
    return f"agraph ({inputs}) => ({outputs}) <{initializers}> {{ {nodes} }}"


CONV = graph(X, Y, f"{PAIR} {WEIGHT} y = Conv<{SAME}>(d, wd, b)")
"""One quantized convolution, as it should be."""

PRODUCT = graph(
    "float[4, 32] x",
    "float[4, 16] y",
    f"{PAIR} wd = DequantizeLinear<axis = 1>(m, ws, wz) y = MatMul(d, wd)",
)
"""One quantized product with a weight [inputs, outputs]."""

RESIDUAL = graph(
    X,
    Y,
    f"""{PAIR} {WEIGHT}
    c = Conv<{SAME}>(d, wd, b) r = Relu(c)
    a = Add(r, d)
    q2 = QuantizeLinear(a, s2, z) d2 = DequantizeLinear(q2, s2, z)
    y = Conv<{SAME}>(d2, wd, b)""",
)
"""A residual add of which the skip is quantized, and another convolution behind."""

ATTENTION = graph(
    "float[2, 4, 32, 16] x, float[2, 4, 16, 32] k, float[2, 4, 32, 16] v, float[2, 1, 32, 32] mask",
    "float[2, 4, 32, 16] y",
    f"""{PAIR}
    kq = QuantizeLinear(k, s, z) kd = DequantizeLinear(kq, s, z)
    vq = QuantizeLinear(v, s, z) vd = DequantizeLinear(vq, s, z)
    p = MatMul(d, kd)
    t = Softmax<axis = -1>(p)
    tq = QuantizeLinear(t, s2, z) td = DequantizeLinear(tq, s2, z)
    y = MatMul(td, vd)""",
)
"""A fused attention: all four operands of its products are quantized."""

FLOAT_ATTENTION = graph(
    "float[2, 4, 32, 16] x, float[2, 4, 16, 32] k, float[2, 4, 32, 16] v, float[2, 1, 32, 32] mask",
    "float[2, 4, 32, 16] y",
    "p = MatMul(x, k) pm = Add(p, mask) t = Softmax<axis = -1>(pm) y = MatMul(t, v)",
)
"""An attention with a mask, in float, as it should be."""

CONCAT = graph(
    f"{X}, float[1, 16, 8, 8] x2",
    Y,
    f"""{PAIR}
    q2 = QuantizeLinear(x2, s, z) d2 = DequantizeLinear(q2, s, z)
    c = Concat<axis = 1>(d, d2)
    q3 = QuantizeLinear(c, s, z) d3 = DequantizeLinear(q3, s, z)
    wd = DequantizeLinear<axis = 0>(w2, ws, wz)
    y = Conv<{SAME}>(d3, wd, b)""",
    f"{INITIALIZERS}, int8[16, 32, 3, 3] w2 = {{1...}}",
)
"""A concatenation with one scale on both inputs and the output."""


def swap(text: str, *pairs: tuple[str, str]) -> str:
    """Return text with each first string replaced by its second; all must be there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def added(text: str, initializers: str) -> str:
    """Return a graph with more initializers."""
    signature, rest = text.split(") <", 1)
    return f"{signature}) <{initializers}, {rest}"
