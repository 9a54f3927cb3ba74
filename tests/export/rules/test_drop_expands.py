import pytest

from fakequant.export.rules.drop_expands import DropExpands

TEXT = """
agraph (float[n, 4] x, float[n, 4] y, float[1, 4] z) => (float[n, 4] r)
{{
    q = fakequant.Quantizer<name = "a">(x)
    o = {op}
    shape = Shape{attributes}({of})
    e = Expand(o, shape)
    r = Relu(e)
}}
"""


def text(op: str, of: str, attributes: str = "") -> str:
    return TEXT.format(op=op, of=of, attributes=attributes)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize(
    ("operands", "of"), [("x, y", "x"), ("y, x", "x"), ("q, y", "x"), ("x, y", "q"), ("q, y", "q"), ("z, x", "z")]
)
def test_the_shape_of_an_operand_changes_nothing(parse, ops, op, operands, of):
    model = parse(text(f"{op}({operands})", of))
    DropExpands()(model)
    assert "Expand" not in ops(model)
    assert list(model.graph)[-1].inputs[0].producer().op_type == op


@pytest.mark.parametrize(
    ("op", "of", "attributes"),
    [("Add(z, z)", "x", ""), ("Relu(z)", "x", ""), ("Add(x, y)", "x", "<end = 2>"), ("Sin(x)", "x", "")],
    ids=["other", "unary", "part of the shape", "unknown op"],
)
def test_another_expand_stays(parse, ops, op, of, attributes):
    model = parse(text(op, of, attributes))
    assert not DropExpands()(model).modified
    assert "Expand" in ops(model)
