"""Whatever is changed in a file: it is refused, and the model is what it was, or it gives a model that can be saved."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

import fakequant as fq
from fakequant.errors import CheckpointError


@pytest.fixture(scope="module")
def everything(saved_models):
    """Folded, followed, shared, one a call, for one target: there is nothing that its manifest has not."""
    return saved_models.CASES["in training"]


@pytest.fixture(scope="module")
def saved(everything, tmp_path_factory):
    """The path of a file, what is in it, and its header."""
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    fq.save_quantized(everything.model(), path)
    with safe_open(path, framework="pt") as file:
        return path, path.read_bytes(), file.metadata()


def places(value, *above):
    """Yield the keys that lead to everything in a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*above, key)
        if isinstance(item, dict | list):
            yield from places(item, *above, key)


def found_in(value):
    """Yield everything in a JSON value that is no object."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from found_in(item)
        else:
            yield item


NUMBERS = st.integers(-2, 40) | st.integers() | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=3)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))


@st.composite
def changes(draw, manifest):
    """Return a manifest with one to three of its entries removed, replaced by others of it, or by anything."""
    changed = json.loads(json.dumps(manifest))
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from([*places(changed)]))
        holder = changed
        for step in above:
            holder = holder[step]
        how = draw(st.sampled_from(["remove", "replace", "swap", "name"]))
        if how == "remove":
            del holder[key]
        elif how == "name" and isinstance(holder, dict):
            holder[draw(st.text(max_size=3))] = holder.pop(key)
        else:
            other = [item for item in found_in(manifest) if type(item) is type(holder[key])]
            holder[key] = draw(st.sampled_from(other) if other and how == "swap" else VALUES)
    return changed


def check(everything, contents, path):
    """Load a file; on an error check that nothing was changed, else that the model can be saved and loaded."""
    model = everything.float_model()
    before = contents(model)
    try:
        fq.load_quantized(model, path)
    except CheckpointError:
        assert contents(model) == before
    else:
        fq.save_quantized(model, path)
        again = fq.load_quantized(everything.float_model(), path)
        assert fq.manifest_of(again) == fq.manifest_of(model)
        fq.retarget(model, "onnxruntime")


@settings(max_examples=60)
@given(data=st.data())
def test_a_manifest(everything, saved, contents, data):
    path, content, header = saved
    changed = data.draw(changes(json.loads(header["manifest"])))
    path.write_bytes(save(load(content), {**header, "manifest": json.dumps(changed)}))
    check(everything, contents, path)


@settings(max_examples=40)
@given(data=st.data())
def test_bytes(everything, saved, contents, data):
    path, content, _ = saved
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    check(everything, contents, path)
