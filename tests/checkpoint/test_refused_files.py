"""Files that ``save_quantized`` did not write, or not like this, are refused, and nothing is changed or executed."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fakequant as fq


def rewritten(path, tensors=None, **metadata):
    """Save a file again with other tensors, or with other metadata; None leaves an entry out."""
    with safe_open(path, framework="pt") as file:
        header = {**file.metadata(), **metadata}
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, {key: value for key, value in header.items() if value is not None})


def with_manifest(path, change):
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    change(manifest)
    rewritten(path, manifest=json.dumps(manifest))


def with_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    rewritten(path, tensors)


class Executed:
    def __reduce__(self):
        return (pytest.fail, ("a file was executed",))


OTHERS = {
    "absent": lambda path, model: None,
    "folder": lambda path, model: path.mkdir(),
    "empty": lambda path, model: path.write_bytes(b""),
    "text": lambda path, model: path.write_text("a model"),
    "pickle": lambda path, model: path.write_bytes(pickle.dumps(Executed())),
    "torch.save": lambda path, model: torch.save(model, path),
    "ranges": lambda path, model: fq.save_amax(model, path),
    "safetensors": lambda path, model: save_file({"x": torch.zeros(1)}, path),
    "cut": lambda path, model: (fq.save_quantized(model, path), path.write_bytes(path.read_bytes()[:-1])),
}


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_kind(placed, path, write, refuses):
    write(path, placed.model())
    refuses(placed.float_model(), r"model.safetensors: expected a file of save_quantized, got")


# Manifests and tensors that save_quantized would not write.


def at(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


FC, SMALL, ONCE = ("modules", "fc"), ("modules", "small"), ("modules", "once", "sites")
ADD = (*ONCE, "calls", "add_0")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (at("version", value=2), "version: expected 1, got 2"),
        (at("version", value=True), "version: expected int, got bool"),
        (at("more", value=1), r"expected no other fields, got \['more'\]"),
        (at("modules", value=[]), "modules: expected an object, got list"),
        (
            at("folded", "wide", value="fc"),
            "wide: expected a layer and a batch norm .* got QuantConv2d and QuantLinear",
        ),
        (at("folded", "small", value="twice.bn"), "small: expected a layer and a batch norm that can be folded"),
        (at("folded", "fc", value=["twice"]), "folded: expected the names of two modules"),
        (at("aliases", "other", value="fc"), "expected modules with several names"),
        (at(*FC, "form", value="QuantLSTM"), "fc: expected a class QuantLSTM for Linear, got none"),
        (at(*FC, "form", value="Linear"), "fc: expected a class Linear for Linear, got none"),
        (at(*FC, "class", value="os.system"), "fc: expected os.system, got Linear"),
        (at(*FC, "is_hidden", value=1), "fc: is_hidden: expected bool, got int"),
        (at(*FC, "is_float", value=True), r"fc: expected .* the targets that want it, got QuantLinear for \[\]"),
        (at(*FC, "quantizers", "_weight_quantizer", value=99), "fc: _weight_quantizer: expected the number of one of"),
        (at(*FC, "quantizers", "_weight_quantizer", value=-1), "_weight_quantizer: .* quantizers, got -1"),
        (at(*FC, "quantizers", "_weight_quantizer", value={"slot": "a", "calls": [0]}), "one quantizer of a weight"),
        (at(*FC, "quantizers", "_input_quantizer", value={"slot": "a", "calls": []}), "a quantizer for each call"),
        (at(*FC, "quantizers", "forward", value=0), r"fc: expected quantizers among .* got \['forward'\]"),
        (at(*FC, "quantizers", value={}), r"fc: expected a quantizer for each input, got none for \['input'\]"),
        (at(*SMALL, "targets", value=["mars"]), "small: targets: expected names among"),
        (at("modules", "twice.bn", "targets", value=["tensorrt"]), "twice.bn: expected a quantized class"),
        (at(*ADD, "kind", value="exec"), "once: add_0: expected a known op, got 'exec'"),
        (at(*ADD, "kind", value="mul"), "expected the name mul_<number of the call>, got 'add_0'"),
        (at(*ADD, "quantizers", "forward", value=0), r"expected operands of add, got \['forward'\]"),
        (at(*ADD, "targets", "more", value=[]), r"targets: expected no other fields, got \['more'\]"),
        (at(*ADD, "stand_by", value=["none"]), "stand_by: expected names among"),
        (at(*ONCE, "seen", value={"add": "1"}), "seen add: expected int, got str"),
        (at("quantizers", 0, "momentum", value=2.0), "quantizer 0: momentum: expected a number above 0"),
        (at("quantizers", 0, "grid", value={"num_bits": 99}), "quantizer 0: grid: num_bits: expected 2 to 16"),
        (at("quantizers", 0, "grid", value={"num_bits": [[8]]}), "quantizer 0: grid: .*list"),
        (at("quantizers", 0, "grid", value={"scale_amax": 10**400}), "quantizer 0: grid: "),
        (at("quantizers", 0, "grid", value={"calib_method": "mine"}), "quantizer 0: calib_method: expected one of"),
        (at("quantizers", 0, "grid", value={"scheme": "mine"}), "quantizer 0: scheme: expected one of"),
        (at("quantizers", 0, "grids", "mars", value={}), "grids: mars: expected a target among"),
        (
            at("quantizers", 0, "grids", "tensorrt", value={"affine": True}),
            "tensorrt: affine: expected False, got True",
        ),
        (at("quantizers", 1, "grid", "axis", value=7), "_weight_quantizer: .*axis"),
    ],
)
def test_a_manifest_that_was_changed(placed, path, change, match, refuses):
    fq.save_quantized(placed.model(), path)
    with_manifest(path, change)
    refuses(placed.float_model(), match)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"version": NaN}', "[" * 100_000, "1" * 10_000], ids=range(7))
def test_a_manifest_that_is_none(placed, path, text, refuses):
    fq.save_quantized(placed.model(), path)
    rewritten(path, manifest=text)
    refuses(placed.float_model(), "manifest: ")


@pytest.mark.parametrize(
    "ties", ["[]", '{"fc.weight": "fc.bias"}', '{"new": "absent"}', '{"new": ["fc.bias"]}', '{"new": "fc.bias"}', "{}"]
)
def test_ties_that_were_changed(placed, path, ties, refuses):
    fq.save_quantized(placed.model(), path)
    rewritten(path, ties=ties)
    refuses(placed.float_model(), "ties: |state of the model")


RANGE = "twice.conv._weight_quantizer._amax"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("fc.bias"), r"state of the model, got no \['fc.bias'\]"),
        (lambda state: state.pop(RANGE), "state of the model, got no .*_weight_quantizer._amax"),
        (lambda state: state.update(more=torch.zeros(1)), r"and \['more'\] besides"),
        (lambda state: state.update({"fc.bias": torch.zeros(3)}), r"fc.bias: expected \(\(3,\), torch.float32\)"),
        (lambda state: state.update({"fc.bias": torch.zeros(16).int()}), "fc.bias: expected .*torch.int32"),
        (lambda state: state[RANGE].fill_(float("nan")), "(?s)twice.conv._weight_quantizer: .* finite"),
        (lambda state: state[RANGE].fill_(-1), "(?s)twice.conv._weight_quantizer: .* expected finite values >= 0"),
        (lambda state: state.update({RANGE: torch.ones(3)}), r"twice.conv._weight_quantizer: amax: .* got \(3,\)"),
        (lambda state: state.update({RANGE: torch.ones(16).double()}), f"{RANGE}: expected .*torch.float64"),
        (lambda state: state.update({RANGE: torch.ones(16) > 0}), "twice.conv._weight_quantizer: |torch.bool"),
        (
            lambda state: state.update({"fc._input_quantizer._amax": torch.ones(16)}),
            "fc._input_quantizer: .* one shape",
        ),
    ],
)
def test_tensors_that_were_changed(placed, path, change, match, refuses):
    fq.save_quantized(placed.model(), path)
    with_tensors(path, change)
    refuses(placed.float_model(), match)


def test_ends_of_different_shapes(saved_models, path, refuses):
    case = saved_models.CASES["learned"]
    fq.save_quantized(case.model(), path)
    with_tensors(path, lambda state: state.update({"conv._input_quantizer._amin": torch.zeros(0)}))
    refuses(case.float_model(), "conv._input_quantizer: expected one shape of both ends")
