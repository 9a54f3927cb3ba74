import pytest

from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY
from fakequant.export.rules.name_nodes import NameNodes

TEXT = """
agraph (float[2] x) => (float[2] y)
<float s = {0.5}, int8 z = {0}>
{
    q1 = QuantizeLinear(x, s, z)
    d1 = DequantizeLinear(q1, s, z)
    r = Relu(d1)
    q2 = QuantizeLinear(r, s, z)
    y = DequantizeLinear(q2, s, z)
}
"""


def scope(*names: str) -> dict[str, str]:
    return {"pkg.torch.onnx.name_scopes": repr(list(names))}


Q = scope("", "fc", "fc._input_quantizer", "_symbolic")
SCOPES = {"q1": Q, "d1": Q, "r": scope("", "act", "relu"), "q2": Q, "y": Q}


@pytest.fixture
def nodes(parse):
    model = parse(TEXT, SCOPES)
    NameNodes({})(model)
    return list(model.graph)


def test_every_node_has_its_module(nodes):
    inner = "fc._input_quantizer"
    assert [n.metadata_props[MODULE_KEY] for n in nodes] == [inner, inner, "act", inner, inner]


def test_q_and_dq_have_their_quantizer(nodes):
    inner = "fc._input_quantizer"
    assert [n.metadata_props.get(QUANTIZER_KEY) for n in nodes] == [inner, inner, None, inner, inner]


def test_calls_are_counted(nodes):
    assert [n.metadata_props.get(CALL_KEY) for n in nodes] == ["0", "0", None, "1", "1"]


def test_names_are_readable_and_unique(nodes):
    assert [n.name for n in nodes if n.op_type == "QuantizeLinear"] == [
        "fc._input_quantizer.QuantizeLinear",
        "fc._input_quantizer.QuantizeLinear.2",
    ]
    assert nodes[0].outputs[0].name == "fc._input_quantizer.QuantizeLinear.output"


def test_a_graph_without_scopes_stays_as_it_is(parse):
    model = parse(TEXT)
    NameNodes({})(model)
    assert all(not node.metadata_props for node in model.graph)


def test_a_graph_output_keeps_its_name(parse):
    model = parse(TEXT, SCOPES)
    NameNodes({})(model)
    assert model.graph.outputs[0].name == "y"
