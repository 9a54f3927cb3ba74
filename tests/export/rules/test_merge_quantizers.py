import pytest

from fakequant.export.graph import QUANTIZER_KEY
from fakequant.export.rules.merge_quantizers import MergeQuantizers

TWO = """
agraph (float[2, 4] x) => (float[2, 4] out)
<float s = {0.5}, float t = {TWIN_SCALE}, int8 z = {0}, TWIN_TYPE w = {0}>
{
    q1 = QuantizeLinear(x, s, z)
    d1 = DequantizeLinear(q1, s, z)
    q2 = QuantizeLinear(x, t, w)
    d2 = DequantizeLinear(q2, t, w)
    out = Add(d1, d2)
}
"""
NAMES = {
    "q1": {QUANTIZER_KEY: "a"},
    "d1": {QUANTIZER_KEY: "a"},
    "q2": {QUANTIZER_KEY: "b"},
    "d2": {QUANTIZER_KEY: "b"},
}


def two(scale: str = "0.5", dtype: str = "int8") -> str:
    return TWO.replace("TWIN_SCALE", scale).replace("TWIN_TYPE", dtype)


def test_equal_pairs_become_one(parse, ops):
    model = parse(two())
    assert MergeQuantizers()(model).modified
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Add"]


def test_the_one_carries_both_names(parse):
    model = parse(two(), NAMES)
    MergeQuantizers()(model)
    assert [n.metadata_props.get(QUANTIZER_KEY) for n in model.graph] == ["a\nb", "a\nb", None]


def test_a_name_is_not_repeated(parse):
    model = parse(two(), {**NAMES, "q2": {QUANTIZER_KEY: "a"}})
    MergeQuantizers()(model)
    assert model.graph[0].metadata_props[QUANTIZER_KEY] == "a"


@pytest.mark.parametrize("text", [two("0.25"), two(dtype="uint8")], ids=["scale", "type"])
def test_pairs_that_differ_stay(parse, ops, text):
    model = parse(text)
    assert not MergeQuantizers()(model).modified
    assert ops(model).count("QuantizeLinear") == 2


def test_other_tensors_stay(parse, ops):
    model = parse(two().replace("q2 = QuantizeLinear(x, ", "y = Relu(x) q2 = QuantizeLinear(y, "))
    assert not MergeQuantizers()(model).modified
    assert ops(model).count("QuantizeLinear") == 2


def test_other_axes_stay(parse, ops):
    model = parse("""
    agraph (float[2, 2] x) => (float[2, 2] out)
    <float[2] s = {0.5, 1.0}, int8[2] z = {0, 0}>
    {
        q1 = QuantizeLinear<axis = 0>(x, s, z)
        d1 = DequantizeLinear<axis = 0>(q1, s, z)
        q2 = QuantizeLinear<axis = 1>(x, s, z)
        d2 = DequantizeLinear<axis = 1>(q2, s, z)
        out = Add(d1, d2)
    }
    """)
    assert not MergeQuantizers()(model).modified


def test_scales_that_are_not_constant_stay(parse):
    model = parse(two().replace("(float[2, 4] x)", "(float[2, 4] x, float u)").replace("x, s, z", "x, u, z"))
    assert not MergeQuantizers()(model).modified


def test_a_graph_output_stays(parse, ops):
    model = parse(two().replace("(float[2, 4] out)", "(float[2, 4] out, float[2, 4] d2)"))
    MergeQuantizers()(model)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Add"]


@pytest.mark.parametrize(("low", "merged"), [("-4.0", 3), ("-3.5", 0)], ids=["equal", "different"])
def test_clips_in_front_of_narrow_grids_merge_too(parse, ops, low, merged):
    model = parse(
        two()
        .replace("float s =", f"float l = {{-4.0}}, float m = {{{low}}}, float h = {{3.5}}, float s =")
        .replace("q1 = QuantizeLinear(x", "c1 = Clip(x, l, h) q1 = QuantizeLinear(c1")
        .replace("q2 = QuantizeLinear(x", "c2 = Clip(x, m, h) q2 = QuantizeLinear(c2")
    )
    MergeQuantizers()(model)
    assert len(ops(model)) == 7 - merged


def test_equal_dynamic_quantizers_become_one(parse, ops):
    model = parse("""
        agraph (float[2, 4] x) => (float[2, 4] out)
        {
            q, s, z = DynamicQuantizeLinear(x)
            d = DequantizeLinear(q, s, z)
            p, t, v = DynamicQuantizeLinear(x)
            e = DequantizeLinear(p, t, v)
            out = Add(d, e)
        }
    """)
    assert MergeQuantizers()(model).modified
    assert ops(model) == ["DynamicQuantizeLinear", "DequantizeLinear", "Add"]
