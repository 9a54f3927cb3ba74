import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

import fakequant as fq
from fakequant.export.cut_graph import cut_at_quantizers, expose_codes
from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY
from fakequant.export.stretches import Stretches

TEXT = """
<ir_version: 10, opset_import: ["" : 19]>
agraph (float[4] x) => (float[4] y)
<float s = {0.5}, int8 z = {0}, float t = {0.25}, float[4] w = {1.0, 2.0, 3.0, 4.0}>
{
    q1 = QuantizeLinear(x, s, z)
    d1 = DequantizeLinear(q1, s, z)
    r = Relu(d1)
    q2 = QuantizeLinear(r, t, z)
    d2 = DequantizeLinear(q2, t, z)
    qw = QuantizeLinear(w, t, z)
    dw = DequantizeLinear(qw, t, z)
    y = Add(d2, dw)
}
"""
NAMES = {"q1": ("a", "0"), "q2": ("a\nb", "1"), "qw": ("w", "0")}


@pytest.fixture
def model() -> ir.Model:
    return load(TEXT)


def load(text: str) -> ir.Model:
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    parsed = ir.from_proto(proto)
    for node in parsed.graph:
        if node.outputs[0].name in NAMES:
            quantizer, call = NAMES[node.outputs[0].name]
            node.metadata_props.update({QUANTIZER_KEY: quantizer, CALL_KEY: call})
    return parsed


def test_every_activation_is_a_cut_in_order(model):
    assert [(c.name, c.call, c.given, c.computed) for c in cut_at_quantizers(model)] == [
        ("a", 0, ("q1.given",), ("q1",)),
        ("a (call 2)", 1, ("q2.given",), ("q2",)),
    ]


def test_a_cut_knows_its_quantizers_and_its_grid(model):
    assert [(c.quantizers, c.scale, c.zero_point) for c in cut_at_quantizers(model)] == [
        (("a",), 0.5, 0),
        (("a", "b"), 0.25, 0),
    ]


def test_codes_keep_their_type(model):
    assert {cut.dtype for cut in cut_at_quantizers(model)} == {np.dtype(np.int8)}


def test_readers_see_the_given_codes(model):
    cut_at_quantizers(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        "x": np.array([1, 2, 3, 4], dtype=np.float32),
        "q1.given": np.array([-2, 2, 4, 6], dtype=np.int8),
        "q2.given": np.array([0, 0, 0, 4], dtype=np.int8),
    }
    y, q1, q2 = session.run(["y", "q1", "q2"], feeds)
    assert q1.tolist() == [2, 4, 6, 8], "from x"
    assert q2.tolist() == [0, 4, 8, 12], "from q1.given"
    assert y.tolist() == [1.0, 2.0, 3.0, 5.0], "from q2.given"


def test_outputs_keep_their_place(model):
    cut_at_quantizers(model)
    assert [v.name for v in model.graph.outputs] == ["y", "q1", "q2"]
    assert [v.name for v in model.graph.inputs] == ["x", "q1.given", "q2.given"]


def test_exposed_codes_are_read_as_before(model):
    assert expose_codes(model) == cut_at_quantizers(load(TEXT))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y, q1, q2 = session.run(["y", "q1", "q2"], {"x": np.array([1, 2, 3, -4], dtype=np.float32)})
    assert (q1.tolist(), q2.tolist(), y.tolist()) == ([2, 4, 6, -8], [4, 8, 12, 0], [2, 4, 6, 4])


def test_an_exposed_graph_is_cut_at_the_same_places(model):
    cuts = expose_codes(model)
    assert cut_at_quantizers(model) == cuts
    assert [v.name for v in model.graph.outputs] == ["y", "q1", "q2"]


def test_codes_that_are_an_output_already_are_not_added_again():
    model = load(TEXT.replace("(float[4] y)", "(float[4] y, int8[4] q1)"))
    cut_at_quantizers(model)
    assert [v.name for v in model.graph.outputs] == ["y", "q1", "q2"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(TEXT.replace("q1", "p1").replace("q2", "p2"), id="no-name"),
        pytest.param(
            TEXT.replace(
                "float s = {0.5}, int8 z = {0}, float t = {0.25}", "float[4] t = {1, 2, 3, 4}, int8[4] z = {0, 0, 0, 0}"
            )
            .replace(", s, z", ", t, z")
            .replace("Linear(", "Linear<axis = 0>("),
            id="per-channel",
        ),
        pytest.param(TEXT.replace("int8", "float8e4m3fn"), id="float8"),
        pytest.param(
            TEXT.replace("(float[4] x)", "(float[4] x, float s, float t)").replace(
                "float s = {0.5}, int8 z = {0}, float t = {0.25}", "int8 z = {0}"
            ),
            id="scale",
        ),
    ],
)
def test_what_is_not_cut(text):
    assert cut_at_quantizers(load(text)) == ()


def test_a_call_that_is_no_number(model):
    next(n for n in model.graph if n.outputs[0].name == "q2").metadata_props[CALL_KEY] = "-1"
    with pytest.raises(fq.ValidationError, match="expected the number of a call in its metadata 'fakequant.call', got"):
        cut_at_quantizers(model)


FORK = """
<ir_version: 10, opset_import: ["" : 19]>
agraph (float[4] x, bool c) => (float[4] y)
<float s = {0.5}, int8 z = {0}>
{
    r = Relu(x)
    q1 = QuantizeLinear(r, s, z)
    d1 = DequantizeLinear(q1, s, z)
    n = Shape(x)
    m = Reshape(d1, n)
    k = Constant<value = float {2.0}>()
    a = Add(m, x)
    p = If(c) <then_branch = then () => (float[4] t) { t = Mul(a, k) }, else_branch = other () => (float[4] e) {
        e = Sub(d1, k) }>
    w = Cast<to = 1>(p)
    y = Neg(w)
}
"""
MODULES = {"r": "first", "m": "second", "t": "branch"}


@pytest.fixture
def fork() -> ir.Model:
    model = load(FORK)
    for node in model.graph.all_nodes():
        if node.outputs[0].name in MODULES:
            node.metadata_props[MODULE_KEY] = MODULES[node.outputs[0].name]
    cut_at_quantizers(model)
    return model


@pytest.mark.parametrize(
    ("end", "modules", "sources"),
    [
        ("q1", ("first",), ("x",)),
        ("y", ("second", "(Add)", "(If)", "branch", "(Sub)", "(Neg)"), ("x", "c", "q1.given")),
    ],
)
def test_a_stretch_is_what_lies_between_cuts(fork, end, modules, sources):
    stretch = Stretches(fork.graph).to(end)
    assert (stretch.modules, stretch.sources) == (modules, sources)


def test_a_shape_is_no_source():
    text = FORK.replace("Add(m, x)", "Add(m, m)")
    model = load(text)
    cut_at_quantizers(model)
    assert Stretches(model.graph).to("y").sources == ("c", "q1.given")


def test_the_nodes_of_a_quantizer_are_no_module(fork):
    next(n for n in fork.graph if n.op_type == "Neg").metadata_props[MODULE_KEY] = "a"
    assert "a" not in Stretches(fork.graph).to("y").modules
    assert "(Neg)" not in Stretches(fork.graph).to("y").modules


DYNAMIC = """
<ir_version: 10, opset_import: ["" : 19]>
agraph (float[4] x) => (float[4] y)
{
    q1, s, z = DynamicQuantizeLinear(x)
    y = DequantizeLinear(q1, s, z)
}
"""


def test_a_dynamic_quantizer_is_cut_with_its_scale_and_zero_point():
    graph = load(DYNAMIC)
    (cut,) = cut_at_quantizers(graph)
    assert (cut.scale, cut.zero_point, cut.computed) == (None, None, ("q1", "s", "z"))
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"q1.given": np.arange(4, dtype=np.uint8), "s.given": np.array(0.5, np.float32)}
    given["z.given"] = np.array(2, np.uint8)
    y, scale = session.run(["y", "s"], {"x": np.array([0, 1, 2, 510], np.float32), **given})
    assert (y.tolist(), scale.item()) == ([-1.0, -0.5, 0.0, 0.5], 2.0)


def test_steps_count_from_the_zero_point_that_was_computed():
    (cut,) = expose_codes(load(DYNAMIC))
    arrays = {"q1": np.array([3, 5], np.uint8), "s": np.float32(0.5), "z": np.uint8(4)}
    assert cut.in_steps(arrays, cut.computed).tolist() == [-1, 1]


def test_a_division_by_a_computed_scale_is_cut_behind_it():
    graph = load("""
        <ir_version: 10, opset_import: ["" : 19]>
        agraph (float[2, 2] x, float[2, 1] r) => (float[2, 2] y)
        <float s = {1.0}, uint8 z = {128}>
        {
            rows = Neg(r)
            n = Div(x, rows)
            q1 = QuantizeLinear(n, s, z)
            d = DequantizeLinear(q1, s, z)
            y = Mul(d, rows)
        }
    """)
    next(node for node in graph.graph if node.op_type == "Div").metadata_props[MODULE_KEY] = "a"
    (cut,) = cut_at_quantizers(graph)
    assert (cut.scale, cut.zero_point, cut.computed) == (None, 128, ("q1", "rows"))
    readers = {node.op_type: [value.name for value in node.inputs] for node in graph.graph}
    assert (readers["Div"], readers["Mul"]) == (["x", "rows"], ["d", "rows.given"])
