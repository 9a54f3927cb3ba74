import numpy as np
import pytest

from fakequant.arithmetic import DEAD_SCALE
from fakequant.export.graph import constant_of
from fakequant.export.rules.fold_batchnorm import FoldBatchNorm

CONV = """
agraph (float[1, 2, 3, 3] x) => (float[1, 3, 3, 3] y)
<int8[3, 2, 1, 1] w = {1, -127, 50, 60, 7, 8}, float[3] s = {0.5, 2.0, 1.0}, int8[3] z = {0, 0, 0},
 float[3] b = {1.0, 2.0, 3.0}, float[3] gamma = {-0.5, 2.0, 0.0}, float[3] beta = {0.1, 0.2, 0.3},
 float[3] mean = {1.0, -1.0, 4.0}, float[3] var = {0.25, 4.0, 1.0}>
{
    d = DequantizeLinear<axis = 0>(w, s, z)
    c = Conv<kernel_shape = [1, 1]>(x, d, b)
    y = BatchNormalization<epsilon = 0.001>(c, gamma, beta, mean, var)
}
"""
TRANSPOSED = (
    CONV.replace("int8[3, 2, 1, 1]", "int8[2, 3, 1, 1]")
    .replace("<axis = 0>", "<axis = 1>")
    .replace("Conv<", "ConvTranspose<")
)
X = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)

EXACT = [
    pytest.param(CONV, id="conv"),
    pytest.param(CONV.replace("d, b)", "d)"), id="no-bias"),
    pytest.param(
        CONV.replace("float[3] s = {0.5, 2.0, 1.0}, int8[3] z = {0, 0, 0}", "float s = {0.5}, int8 z = {0}"),
        id="per-tensor",
    ),
    pytest.param(TRANSPOSED, id="conv-transpose"),
    pytest.param(CONV.replace("<epsilon = 0.001>", ""), id="default-epsilon"),
]


@pytest.mark.parametrize("text", EXACT)
def test_the_graph_computes_the_same(parse, run, text):
    model = parse(text)
    (before,) = run(model, x=X)
    rule = FoldBatchNorm()
    assert rule(model).modified
    assert (rule.folded, rule.skipped) == (1, {})
    np.testing.assert_allclose(run(model, x=X)[0], before, rtol=1e-5, atol=1e-5)


def test_only_dq_and_conv_are_left(parse, ops):
    model = parse(CONV)
    FoldBatchNorm()(model)
    assert ops(model) == ["DequantizeLinear", "Conv"]
    assert model.graph.outputs[0] is model.graph[1].outputs[0]
    assert model.graph.outputs[0].name == "y"


def test_codes_change_their_sign_only(parse):
    model = parse(CONV)
    FoldBatchNorm()(model)
    codes = constant_of(model.graph[0].inputs[0])
    assert codes.ravel().tolist() == [-1, 127, 50, 60, 0, 0]
    assert codes.dtype == np.int8


def test_scales_take_the_factor(parse):
    model = parse(CONV)
    FoldBatchNorm()(model)
    scale = constant_of(model.graph[0].inputs[1])
    expected = [0.5 * 0.5 / np.sqrt(0.251), 2.0 * 2.0 / np.sqrt(4.001), DEAD_SCALE]
    np.testing.assert_allclose(scale, expected, rtol=1e-6)


def test_a_scale_per_tensor_becomes_one_per_channel(parse):
    model = parse(EXACT[2].values[0])
    FoldBatchNorm()(model)
    assert [constant_of(v).shape for v in model.graph[0].inputs[1:]] == [(3,), (3,)]
    assert model.graph[0].attributes.get_int("axis") == 0


SHARED = CONV.replace("=> (float[1, 3, 3, 3] y)", "=> (float[1, 3, 3, 3] y, float[1, 3, 3, 3] o)")
GROUPED = """
agraph (float[1, 4, 2, 2] x) => (float[1, 4, 2, 2] y)
<int8[4, 2, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] s = {0.5, 2.0}, int8[2] z = {0, 0},
 float[4] p = {1.0, 2.0, 3.0, 4.0}>
{
    d = DequantizeLinear<axis = 1>(w, s, z)
    c = ConvTranspose<kernel_shape = [1, 1], group = 2>(x, d)
    y = BatchNormalization(c, p, p, p, p)
}
"""
REFUSED = [
    pytest.param(
        SHARED.replace("y = B", "o = Relu(c) y = B"), "the convolution's output has another reader", id="reader"
    ),
    pytest.param(
        SHARED.replace("float[1, 3, 3, 3] o", "float[1, 3, 3, 3] c"),
        "the convolution's output has another reader",
        id="output",
    ),
    pytest.param(
        SHARED.replace("y = B", "o = Conv(x, d) y = B"),
        "the weight is not quantized, or shared with another layer",
        id="shared",
    ),
    pytest.param(
        CONV.replace("int8[3, 2, 1, 1] w", "float[3, 2, 1, 1] d").replace(
            "d = DequantizeLinear<axis = 0>(w, s, z)", ""
        ),
        "the weight is not quantized, or shared with another layer",
        id="float-weight",
    ),
    pytest.param(
        CONV.replace("int8[3, 2, 1, 1] w", "float[3, 2, 1, 1] f").replace(
            "d = D", "w = QuantizeLinear<axis = 0>(f, s, z) d = D"
        ),
        "the weight is not stored as signed integers",
        id="pair",
    ),
    pytest.param(
        CONV.replace("-127", "127").replace("int8", "uint8"),
        "the weight is not stored as signed integers",
        id="unsigned",
    ),
    pytest.param(
        CONV.replace(", float[3] mean = {1.0, -1.0, 4.0}", "").replace("3, 3] x)", "3, 3] x, float[3] mean)"),
        "scale, shift or statistics are not constant",
        id="statistics",
    ),
    pytest.param(
        CONV.replace("3, 3] x)", "3, 3] x, float[3] u)").replace("d, b)", "d, u)"),
        "the bias is not constant",
        id="bias",
    ),
    pytest.param(
        CONV.replace(
            "float[3] s = {0.5, 2.0, 1.0}, int8[3] z = {0, 0, 0}", "float[2] s = {0.5, 2.0}, int8[2] z = {0, 0}"
        ).replace("axis = 0", "axis = 1"),
        "ranges along another axis, or shared by channel groups",
        id="axis",
    ),
    pytest.param(GROUPED, "ranges along another axis, or shared by channel groups", id="groups"),
    pytest.param(CONV.replace("-127", "-128"), "a code has no negative in its type", id="-128"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_a_refusal_has_its_reason(parse, text, reason):
    model = parse(text)
    rule = FoldBatchNorm()
    assert not rule(model).modified
    assert list(rule.skipped.values()) == [reason]
    assert [n.op_type for n in model.graph].count("BatchNormalization") == 1


def test_a_norm_of_something_else_is_no_refusal(parse):
    model = parse("""
    agraph (float[1, 2, 3, 3] x) => (float[1, 2, 3, 3] y)
    <float[2] p = {1.0, 2.0}>
    { r = Relu(x) y = BatchNormalization(r, p, p, p, p) }
    """)
    rule = FoldBatchNorm()
    assert not rule(model).modified
    assert rule.skipped == {}
