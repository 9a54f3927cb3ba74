from fakequant.export.graph import QUANTIZER_KEY
from fakequant.export.rules.name_scales import NameScales

TEXT = """
agraph (float[2] x) => (float[2] y)
<float val_1 = {0.5}, int8 val_2 = {0}, float val_3 = {0.25}>
{
    q1 = QuantizeLinear(x, val_1, val_2)
    d1 = DequantizeLinear(q1, val_1, val_2)
    q2 = QuantizeLinear(d1, val_3, val_2)
    y = DequantizeLinear(q2, val_3, val_2)
}
"""
NAMES = {key: {QUANTIZER_KEY: name} for key, name in (("q1", "a\nc"), ("d1", "a\nc"), ("q2", "b"), ("y", "b"))}


def test_scales_and_zero_points_are_named_after_the_first_reader(parse):
    model = parse(TEXT, NAMES)
    assert NameScales()(model).modified
    assert [[v.name for v in node.inputs[1:]] for node in model.graph] == [
        ["a.scale", "a.zero_point"],
        ["a.scale", "a.zero_point"],
        ["b.scale", "a.zero_point"],
        ["b.scale", "a.zero_point"],
    ]


def test_a_node_without_quantizer_keeps_its_names(parse):
    model = parse(TEXT)
    assert not NameScales()(model).modified
    assert sorted(model.graph.initializers) == ["val_1", "val_2", "val_3"]


def test_a_taken_name_is_left_to_its_owner(parse):
    model = parse(TEXT, NAMES)
    model.graph.initializers["val_3"].name = "a.scale"
    NameScales()(model)
    assert sorted(model.graph.initializers) == ["a.zero_point", "b.scale", "val_1"]
