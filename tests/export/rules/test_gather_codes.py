import numpy as np
import onnx_ir as ir
import pytest

from fakequant.export.graph import constant_of
from fakequant.export.rules.float_tables import FloatTables
from fakequant.export.rules.gather_codes import GatherCodes

TABLE = np.array([[1, -2], [3, 4], [-5, 127]], np.int8)
INDICES = np.array([[2, 0], [1, 1]])
GRIDS = {
    "tensor": ("float s = {0.3}, int8 z = {0}", "", 0.3, 0),
    "row": ("float[3] s = {0.3, 2.0, 0.7}, int8[3] z = {0, 0, 0}", "<axis = 0>", [[0.3], [2.0], [0.7]], 0),
    "column": ("float[2] s = {0.3, 2.0}, int8[2] z = {0, 0}", "<axis = 1>", [0.3, 2.0], 0),
    "row with zero point": ("float[3] s = {0.3, 2.0, 0.7}, int8[3] z = {5, 0, -9}", "<axis = 0>", None, None),
    "tensor with zero point": ("float s = {0.3}, int8 z = {5}", "", 0.3, 5),
}
GRIDS["row with zero point"] = (*GRIDS["row with zero point"][:2], GRIDS["row"][2], [[5], [0], [-9]])
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_rule = pytest.mark.parametrize("rule", [GatherCodes, FloatTables])


def text(grid, nodes="y = Gather(d, i)", outputs="float[2, 2, 2] y"):
    parameters, axis, *_ = grid
    return f"""
    agraph (int64[2, 2] i) => ({outputs})
    <int8[3, 2] w = {{1, -2, 3, 4, -5, 127}}, {parameters}>
    {{ d = DequantizeLinear{axis}(w, s, z) {nodes} }}
    """


def values(grid):
    """Return the dequantized table, by the definition of DequantizeLinear."""
    *_, scale, zero_point = grid
    return (TABLE.astype(np.float32) - np.float32(zero_point)) * np.asarray(scale, np.float32)


@every_rule
@every_grid
def test_the_same_rows_are_found(parse, run, grid, rule):
    model = parse(text(grid))
    assert rule()(model).modified
    np.testing.assert_array_equal(run(model, i=INDICES)[0], values(grid)[INDICES])


@every_grid
def test_codes_are_looked_up(parse, grid):
    model = parse(text(grid))
    GatherCodes()(model)
    (of_codes,) = [
        node for node in model.graph if node.inputs[0].dtype == ir.DataType.INT8 and node.op_type == "Gather"
    ]
    np.testing.assert_array_equal(constant_of(of_codes.inputs[0]), TABLE)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("tensor", ["Gather", "DequantizeLinear"]),
        ("column", ["Gather", "DequantizeLinear"]),
        ("row", ["Gather", "Cast", "Gather", "Mul"]),
        ("row with zero point", ["Gather", "Cast", "Gather", "Gather", "Sub", "Mul"]),
    ],
)
def test_no_table_is_dequantized(parse, ops, grid, expected):
    model = parse(text(GRIDS[grid]))
    GatherCodes()(model)
    assert sorted(ops(model)) == sorted(expected)


def test_float_table_is_stored_as_it_is_used(parse, ops):
    model = parse(text(GRIDS["row"]))
    FloatTables()(model)
    assert ops(model) == ["Gather"]
    np.testing.assert_array_equal(constant_of(model.graph[0].inputs[0]), values(GRIDS["row"]))


@every_rule
@every_grid
def test_several_look_ups_and_another_reader(parse, run, grid, rule):
    nodes = "y = Gather(d, i) u = Gather(d, i) v = Neg(d)"
    model = parse(text(grid, nodes, "float[2, 2, 2] y, float[2, 2, 2] u, float[3, 2] v"))
    rule()(model)
    rows, again, negative = run(model, i=INDICES)
    np.testing.assert_array_equal(rows, again)
    np.testing.assert_array_equal(rows, values(grid)[INDICES])
    np.testing.assert_array_equal(negative, -values(grid))


@every_rule
def test_quantizer_is_named_where_its_values_are(parse, rule):
    model = parse(text(GRIDS["row"]), {"d": {"fakequant.quantizer": "table._weight_quantizer"}})
    rule()(model)
    assert [n.outputs[0].name for n in model.graph if "fakequant.quantizer" in n.metadata_props] == ["y"]


@every_rule
@pytest.mark.parametrize(
    "nodes",
    ["y = Gather<axis = 1>(d, i)", "q = Gather(w, i) e = Cast<to = 1>(q) y = Add(e, e)"],
    ids=["another axis", "no DequantizeLinear between"],
)
def test_other_look_ups_stay(parse, rule, nodes):
    shape = "float[3, 2, 2] y" if "axis" in nodes else "float[2, 2, 2] y"
    model = parse(text(GRIDS["tensor"], nodes, shape))
    assert not rule()(model).modified


@every_rule
def test_activations_stay(parse, rule):
    model = parse("""
    agraph (int8[3, 2] w, int64[2] i) => (float[2, 2] y)
    <float s = {0.5}, int8 z = {0}>
    { d = DequantizeLinear(w, s, z) y = Gather(d, i) }
    """)
    assert not rule()(model).modified
