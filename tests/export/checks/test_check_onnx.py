"""check_onnx: findings with all they should say, in order, in files of any shape."""

import contextlib
import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_texts import CONV, INITIALIZERS, PAIR, SAME, WEIGHT, X, Y, graph, swap

import fakequant as fq
from fakequant.export import CheckReport, Severity
from fakequant.export.graph import MODULE_KEY

THREE = graph(
    f"{X}, float[1, 16, 8, 8] x2",
    f"{Y}, float[1, 16, 8, 8] y2",
    f"{swap(PAIR, ('(x, s', '(x, s0'))} {WEIGHT} y = Conv<{SAME}>(x2, wd) c = mine.Special(d) y2 = Relu(c)",
    f"{INITIALIZERS}, float s0 = {{0.0}}",
)
"""An error, a warning and a note."""


def test_errors_come_first_and_notes_apart(check):
    report = check(THREE)
    assert [finding.rule for finding in report.findings] == ["R4", "R30"]
    assert [finding.rule for finding in report.notes] == ["R48"]
    assert [finding.rule for finding in report.errors] == ["R4"]
    assert [finding.rule for finding in report.warnings] == ["R30"]


def test_it_prints_one_line_a_finding_and_a_summary(check):
    report = check(THREE)
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["error", "R4"], ["warning", "R30"], ["info", "R48"]]
    assert lines[-1] == f"{report.path} for tensorrt: 1 error, 1 warning, 1 note"


def test_a_clean_file_prints_a_summary(check):
    report = check(CONV)
    assert str(report) == f"{report.path} for tensorrt: 0 errors, 0 warnings, 0 notes"


def test_a_finding_says_all(check):
    (finding,) = check(swap(CONV, ("float s = {0.1}", "float s = {0.0}"))).findings
    assert str(finding) == (
        "error R4 QuantizeLinear of q: expected finite scales above 0, got 0 (1 of 1 are wrong). "
        "Keep every scale above 0; a channel that is all zeros may have any scale, such as 1."
    )


def test_a_finding_names_node_and_module(tmp_path, parsed):
    model = ir.from_proto(parsed(swap(CONV, ("<axis = 0>", "<axis = 1>"))))
    model.graph[-1].name, model.graph[-1].metadata_props[MODULE_KEY] = "conv_7", "layer1.conv"
    ir.save(model, tmp_path / "m.onnx")
    (finding,) = fq.check_onnx(tmp_path / "m.onnx").findings
    assert (finding.node, finding.module, finding.severity) == ("conv_7", "layer1.conv", Severity.ERROR)
    assert "conv_7 (module layer1.conv)" in str(finding)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number(tmp_path, parsed, value):
    model = ir.from_proto(parsed(CONV))
    model.graph.initializers["ws"].const_value = ir.tensor(np.array([0.1] * 15 + [value], np.float32), name="ws")
    ir.save(model, tmp_path / "m.onnx")
    (finding,) = fq.check_onnx(tmp_path / "m.onnx").findings
    assert finding.rule == "R4"
    assert f"got {value:g} (1 of 16" in finding.problem


def test_a_pair_with_one_fault_is_one_finding(check):
    assert len(check(swap(CONV, ("z = {0},", "z = {3},"))).findings) == 1


def test_a_pair_with_two_faults_is_two_findings(check):
    changed = swap(CONV, ("z = {0},", "z = {3}, float s3 = {0.3}, int8 z3 = {4},"), ("(q, s, z)", "(q, s3, z3)"))
    assert [finding.problem.split(" (")[0] for finding in check(changed).findings] == [
        "expected zero point 0, got 3",
        "expected zero point 0, got 4",
    ]


def test_inner_graphs_are_checked(check):
    pair = "qi = QuantizeLinear(x, si, z) t = DequantizeLinear(qi, si, z)"
    then = f"then_branch = a () => (float[1, 16, 8, 8] t) <float si = {{0.0}}> {{ {pair} }}"
    otherwise = "else_branch = e () => (float[1, 16, 8, 8] u) { u = Relu(x) }"
    report = check(graph(f"{X}, bool c", Y, f"y = If<{then}, {otherwise}>(c)"))
    assert [finding.rule for finding in report.findings] == ["R4"]


def test_functions_are_checked(check):
    function = (
        '<domain: "mine", opset_import: ["" : 19]> Pair (a, s, z) => (c)'
        " { b = QuantizeLinear(a, s, z) c = DequantizeLinear(b, s, z) }"
    )
    text = graph(X, Y, "y = mine.Pair(x, s0, z)", f"{INITIALIZERS}, float s0 = {{0.0}}") + function
    assert [finding.rule for finding in check(text).findings] == ["R4"]


def test_initializers_that_are_inputs_too_are_constants(tmp_path, parsed):
    proto = parsed(CONV)
    model = ir.from_proto(proto)
    model.graph.inputs.extend(model.graph.initializers.values())
    ir.save(model, tmp_path / "m.onnx")
    assert fq.check_onnx(tmp_path / "m.onnx").findings == ()


def test_the_file_is_left_as_it_was(tmp_path, parsed):
    onnx.save(parsed(THREE), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    assert isinstance(fq.check_onnx(str(tmp_path / "m.onnx")), CheckReport)
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_unknown_target(tmp_path, parsed):
    onnx.save(parsed(CONV), tmp_path / "m.onnx")
    with pytest.raises(
        fq.InvalidValueError,
        match=r"target: expected one of \['onnxruntime-cuda', 'tensorrt', 'tensorrt-ep'\], got 'toaster'",
    ):
        fq.check_onnx(tmp_path / "m.onnx", target="toaster")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(fq.ValidationError, match="nothing there"):
        fq.check_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_checked_or_refused(tmp_path, parsed, seed):
    damage = random.Random(seed)
    content = bytearray(parsed(THREE).SerializeToString())
    for _ in range(4):
        content[damage.randrange(len(content))] = damage.randrange(256)
    (tmp_path / "m.onnx").write_bytes(content)
    with contextlib.suppress(fq.ValidationError):
        assert str(fq.check_onnx(tmp_path / "m.onnx"))
