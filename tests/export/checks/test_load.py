"""Files that cannot be read are refused with the reason, and nothing is written beside them."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_texts import CONV, X, Y, graph

import fakequant as fq
from fakequant.export.load import load_model


@pytest.fixture
def folder(tmp_path):
    """A folder in which a test leaves its file and nothing may appear afterwards."""
    inside = tmp_path / "inside"
    inside.mkdir()
    return inside


def refusal(path: Path) -> str:
    """Return the message of the refusal."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(fq.ValidationError) as caught:
        load_model(path)
    assert sorted(path.parent.rglob("*")) == before
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.fixture
def model(parsed):
    return parsed(CONV)


@pytest.fixture
def external(folder, model):
    """Write a model with its weights beside it; return the proto to change and the path."""

    def write(**entries: str | None) -> Path:
        path = folder / "m.onnx"
        ir.save(ir.from_proto(model), path, external_data="m.onnx.data", size_threshold_bytes=1024)
        proto = onnx.load(path, load_external_data=False)
        (tensor,) = [t for t in proto.graph.initializer if t.name == "w"]
        for key, value in entries.items():
            for entry in [e for e in tensor.external_data if e.key == key]:
                tensor.external_data.remove(entry)
            if value is not None:
                tensor.external_data.add(key=key, value=value)
        path.write_bytes(proto.SerializeToString())
        return path

    return write


def test_a_good_file(folder, model):
    onnx.save(model, folder / "m.onnx")
    assert [node.op_type for node in load_model(folder / "m.onnx").graph][-1] == "Conv"


def test_shapes_are_inferred(folder, model):
    onnx.save(model, folder / "m.onnx")
    nodes = list(load_model(folder / "m.onnx").graph)
    assert list(nodes[0].outputs[0].shape) == [1, 16, 8, 8]
    assert nodes[0].outputs[0].dtype == ir.DataType.INT8


def test_a_good_file_with_external_data(external):
    path = external()
    (weight,) = [v for name, v in load_model(path).graph.initializers.items() if name == "w"]
    assert np.all(weight.const_value.numpy() == 1)


def test_a_relative_path(external, monkeypatch):
    monkeypatch.chdir(external().parent)
    assert load_model("m.onnx").graph.initializers["w"].const_value.numpy().shape == (16, 16, 3, 3)


def test_custom_ops_are_allowed(folder, parsed):
    onnx.save(parsed(graph(X, Y, "y = mine.Special(x)")), folder / "m.onnx")
    assert load_model(folder / "m.onnx").graph[0].domain == "mine"


def test_functions_are_inlined(folder, parsed):
    function = '<domain: "mine", opset_import: ["" : 19]> Half (a) => (c) { b = Relu(a) c = Sigmoid(b) }'
    onnx.save(parsed(graph(X, Y, "y = mine.Half(x)") + function), folder / "m.onnx")
    assert [node.op_type for node in load_model(folder / "m.onnx").graph] == ["Relu", "Sigmoid"]


class TestNoOnnx:
    def test_nothing_there(self, folder):
        assert refusal(folder / "m.onnx").endswith("expected an ONNX file, got nothing there")

    def test_a_folder(self, folder):
        (folder / "m.onnx").mkdir()
        assert refusal(folder / "m.onnx").endswith("expected an ONNX file, got a folder")

    def test_empty(self, folder):
        (folder / "m.onnx").write_bytes(b"")
        assert refusal(folder / "m.onnx").endswith("expected an ONNX file, got an empty one")

    @pytest.mark.parametrize("content", [b"hello, world", b"PK\x03\x04" + bytes(100), bytes(100), os.urandom(1000)])
    def test_something_else(self, folder, content):
        (folder / "m.onnx").write_bytes(content)
        assert "expected an ONNX file" in refusal(folder / "m.onnx")

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
    def test_cut_off(self, folder, model, share):
        whole = model.SerializeToString()
        (folder / "m.onnx").write_bytes(whole[: int(share * len(whole))])
        assert "expected a" in refusal(folder / "m.onnx")

    def test_a_message_without_a_version(self, folder):
        (folder / "m.onnx").write_bytes(onnx.ModelProto(producer_name="nobody").SerializeToString())
        assert "without IR version or opset" in refusal(folder / "m.onnx")

    def test_no_graph(self, folder, model):
        model.ClearField("graph")
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        assert "expected a valid ONNX model" in refusal(folder / "m.onnx")


class TestContents:
    @pytest.mark.parametrize("version", [0, 99])
    def test_unknown_opset(self, folder, model, version):
        model.opset_import[0].version = version
        onnx.save(model, folder / "m.onnx")
        assert f"expected opset 1 to {onnx.defs.onnx_opset_version()}" in refusal(folder / "m.onnx")

    def test_unknown_opset_under_the_long_name(self, folder, model):
        model.opset_import[0].domain, model.opset_import[0].version = "ai.onnx", 99
        onnx.save(model, folder / "m.onnx")
        assert "of domain 'ai.onnx', got 99" in refusal(folder / "m.onnx")

    def test_unknown_op(self, folder, model):
        model.graph.node[-1].op_type = "Convolve"
        onnx.save(model, folder / "m.onnx")
        assert "expected ops of ONNX opset 19, got Convolve" in refusal(folder / "m.onnx")

    def test_an_op_of_a_later_opset(self, folder, parsed):
        onnx.save(parsed(graph(X, Y, "y = Swish(x)")), folder / "m.onnx")
        assert "expected ops of ONNX opset 19, got Swish" in refusal(folder / "m.onnx")

    def test_a_name_that_is_no_text(self, folder, model):
        whole = model.SerializeToString().replace(b"\x22\x04Conv", b"\x22\x04Con\xff")
        (folder / "m.onnx").write_bytes(whole)
        assert "expected" in refusal(folder / "m.onnx")

    def test_invalid_graph(self, folder, model):
        model.graph.node[-1].input[0] = "missing"
        onnx.save(model, folder / "m.onnx")
        assert "expected a valid ONNX model" in refusal(folder / "m.onnx")

    def test_too_few_bytes_in_a_tensor(self, folder, model):
        (tensor,) = [t for t in model.graph.initializer if t.name == "w"]
        tensor.ClearField("int32_data")
        tensor.raw_data = bytes(7)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        assert "w" in refusal(folder / "m.onnx")

    def test_a_function_that_calls_itself(self, folder, parsed):
        function = '<domain: "mine", opset_import: ["" : 19, "mine" : 1]> Loop (a) => (c) { c = mine.Loop(a) }'
        onnx.save(parsed(graph(X, Y, "y = mine.Loop(x)") + function), folder / "m.onnx")
        assert refusal(folder / "m.onnx")


class TestExternalData:
    def test_missing(self, external):
        path = external()
        (path.parent / "m.onnx.data").unlink()
        assert "external data of w: expected the file m.onnx.data, got none" in refusal(path)

    def test_a_folder(self, external):
        path = external(location="sub")
        (path.parent / "sub").mkdir()
        assert "expected the file sub, got a folder" in refusal(path)

    def test_too_short(self, external):
        path = external()
        (path.parent / "m.onnx.data").write_bytes(bytes(10))
        assert "expected 2304 bytes from 0 on in m.onnx.data, got a file of 10" in refusal(path)

    @pytest.mark.parametrize("offset", ["1", "4096"])
    def test_beyond_the_end(self, external, offset):
        assert f"expected 2304 bytes from {offset} on" in refusal(external(offset=offset))

    def test_wrong_length(self, external):
        assert "got a length of 12" in refusal(external(length="12"))

    def test_without_a_length(self, external):
        assert load_model(external(length=None)).graph.initializers["w"].const_value.nbytes == 2304

    @pytest.mark.parametrize("location", ["../outside", "sub/../../outside", "a\\b", "..", ".", "a" * 5000, "x\0y"])
    def test_location_outside(self, external, location):
        path = external(location=location)
        (path.parents[1] / "outside").write_bytes(bytes(4096))
        assert "external data of w: expected" in refusal(path)

    def test_absolute_location(self, external):
        path = external()
        path = external(location=str(path.parent / "m.onnx.data"))
        assert "expected a file in the folder of the model" in refusal(path)

    def test_link_to_the_outside(self, external):
        path = external(location="link")
        (path.parents[1] / "outside").write_bytes(bytes(4096))
        (path.parent / "link").symlink_to(path.parents[1] / "outside")
        assert "expected a file in the folder of the model, got 'link'" in refusal(path)

    def test_links_in_a_circle(self, external):
        path = external(location="link")
        (path.parent / "link").symlink_to("link")
        assert "external data of w: expected" in refusal(path)

    def test_no_location(self, external):
        assert refusal(external(location=None))
