import pytest

from fakequant.export.graph import MODULE_KEY
from fakequant.export.rules.drop_metadata import DropMetadata

TEXT = "agraph (float[2] x) => (float[2] y) <float s = {0.5}> { m = Mul(x, s) y = Relu(m) }"
SECRET = {"pkg.torch.onnx.stack_trace": "/home/user/model.py", "namespace": "x"}


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model,
        lambda model: model.graph,
        lambda model: model.graph[0],
        lambda model: model.graph[0].outputs[0],
        lambda model: model.graph.inputs[0],
        lambda model: model.graph.initializers["s"],
    ],
    ids=["model", "graph", "node", "value", "input", "initializer"],
)
def test_foreign_metadata_goes(parse, part):
    model = parse(TEXT)
    part(model).metadata_props.update(SECRET)
    assert DropMetadata()(model).modified
    assert not part(model).metadata_props


def test_doc_strings_go(parse):
    model = parse(TEXT)
    model.graph[0].doc_string = "/home/user/model.py"
    assert DropMetadata()(model).modified
    assert not model.graph[0].doc_string


def test_fakequants_own_stays(parse):
    model = parse(TEXT)
    model.graph[0].metadata_props[MODULE_KEY] = "conv1"
    assert not DropMetadata()(model).modified
    assert model.graph[0].metadata_props == {MODULE_KEY: "conv1"}
