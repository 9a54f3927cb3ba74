import pytest

from fakequant.export.graph import CALL_KEY, DOMAIN, MODULE_KEY
from fakequant.export.rules.name_nodes import NameNodes

TEXT = """
agraph (float[2] x) => (float[2] y)
{
    q1 = fakequant.Quantizer<name = "fc._input_quantizer">(x)
    r = Relu(q1)
    q2 = fakequant.Quantizer<name = "fc._input_quantizer">(r)
    y = fakequant.Quantizer<name = "other">(q2)
}
"""


def scope(*names: str) -> dict[str, str]:
    return {"pkg.torch.onnx.name_scopes": repr(list(names))}


Q = scope("", "fc", "fc._input_quantizer", "quantizer")
SCOPES = {"q1": Q, "r": scope("", "act", "relu"), "q2": Q, "y": Q}


@pytest.fixture
def nodes(parse):
    model = parse(TEXT, SCOPES)
    NameNodes()(model)
    return list(model.graph)


def test_every_node_has_its_module(nodes):
    inner = "fc._input_quantizer"
    assert [n.metadata_props[MODULE_KEY] for n in nodes] == [inner, "act", inner, inner]


def test_calls_are_counted_for_each_quantizer(nodes):
    assert [n.metadata_props.get(CALL_KEY) for n in nodes if n.domain == DOMAIN] == ["0", "1", "0"]


def test_a_graph_without_scopes_has_no_modules(parse):
    model = parse(TEXT)
    NameNodes()(model)
    assert all(MODULE_KEY not in node.metadata_props for node in model.graph)
