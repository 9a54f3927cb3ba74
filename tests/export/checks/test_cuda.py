"""Rules of ONNX Runtime's CUDA provider, and which of TensorRT's hold for its TensorRT provider."""

import planted_in_placement
import planted_in_quantizers
import pytest
from graph_texts import CONV, PAIR, SAME, WEIGHT, X, Y, added, graph, swap
from planted import planted

from fakequant.export.checks import checks_for

INT4 = swap(CONV, ("int8[16, 16, 3, 3] w", "int4[16, 16, 3, 3] w"), ("int8[16] wz", "int4[16] wz"))
PLANTED = [
    planted("warning C1 newer_than_the_kernels | 23 | got 23: all 3 Q and DQ", CONV, opset=23),
    planted(
        "warning C2 integer_operator_on_the_cpu | QLinearConv | got QLinearConv, which runs on the CPU",
        graph(
            X,
            Y,
            f"q = QuantizeLinear(x, s, z) y0 = QLinearConv<{SAME}>(q, s, z, w, s, z, s, z)"
            " y = DequantizeLinear(y0, s, z)",
        ),
    ),
    planted(
        "warning C2 integer_operator_on_the_cpu | com.microsoft | got com.microsoft::QLinearAdd",
        graph("int8[4] x", "int8[4] y", "y = com.microsoft.QLinearAdd(x, s, z, x, s, z, s, z)"),
    ),
    planted(
        "error C3 scale_does_not_fit_the_axis | size | expected 16 scales for axis 0",
        swap(CONV, ("float[16] ws", "float[15] ws"), ("int8[16] wz", "int8[15] wz")),
    ),
    planted(
        "error C3 scale_does_not_fit_the_axis | default axis | expected 3 scales for axis 1",
        swap(
            swap(CONV, ("int8[16, 16, 3, 3] w", "int8[16, 3, 3, 3] w"), ("1, 16, 8, 8] x", "1, 3, 8, 8] x")),
            ("<axis = 0>", ""),
        ),
    ),
    planted(
        "error C3 scale_does_not_fit_the_axis | no such axis | expected an axis of data with 4 dimensions, got 4",
        swap(CONV, ("<axis = 0>", "<axis = 4>")),
    ),
    planted(
        "warning C4 codes_without_a_kernel | bias | got INT32, which runs on the CPU",
        added(
            swap(CONV, ("y = Conv", "bd = DequantizeLinear(ib, s) y = Conv"), ("wd, b)", "wd, bd)")),
            "int32[16] ib = {5...}",
        ),
    ),
    planted("error C5 four_bits_without_blocks | channels | got 16 scales, one a channel", INT4, opset=21),
    planted(
        "error C5 four_bits_without_blocks | tensor | got one scale",
        added(swap(INT4, ("<axis = 0>(w, ws, wz)", "(w, s, z4)")), "int4 z4 = {0}"),
        opset=21,
    ),
]
CHECKS = checks_for("onnxruntime-cuda")


@pytest.mark.parametrize("case", PLANTED, ids=str)
def test_the_fault_is_found_and_no_other(check, case):
    report = check(case.text, case.opset, "onnxruntime-cuda")
    assert [(finding.rule, finding.severity.name.lower()) for finding in report.findings] == [
        (case.rule, case.severity)
    ]
    assert case.words in report.findings[0].problem
    assert report.notes == ()


def test_every_check_has_a_planted_fault():
    assert {case.check for case in PLANTED} == {registered.name for registered in CHECKS}


@pytest.mark.parametrize("opset", [13, 19, 21, 22])
def test_a_good_file_has_no_findings(check, opset):
    assert check(CONV, opset, "onnxruntime-cuda").findings == ()


def test_from_opset_23_on_four_bits_run_on_the_cpu_with_the_rest(check):
    assert [finding.rule for finding in check(INT4, 23, "onnxruntime-cuda").findings] == ["C1"]


@pytest.mark.parametrize(
    "text",
    [
        swap(CONV, (f"{PAIR} {WEIGHT}", f"{WEIGHT} d = Identity(x)")),
        swap(CONV, ("z = {0},", "z = {3},")),
        swap(CONV, ("kernel_shape = [3, 3], ", "")),
    ],
    ids=["one quantized input", "zero point", "no kernel_shape"],
)
def test_what_only_tensorrt_minds_is_no_finding(check, text):
    assert check(text).findings
    assert check(text, target="onnxruntime-cuda").findings == ()


def test_the_tensorrt_provider_has_the_rules_of_tensorrt_but_takes_an_int32_bias():
    names = [{registered.name for registered in checks_for(target)} for target in ("tensorrt", "tensorrt-ep")]
    assert names[0] - names[1] == {"R3 int32_dequantized"}
    assert names[1] <= names[0]


@pytest.mark.parametrize("case", [*planted_in_quantizers.CODES, *planted_in_placement.OPERATORS], ids=str)
def test_the_tensorrt_provider_gives_the_findings_of_tensorrt(check, case):
    reports = [check(case.text, case.opset, target) for target in ("tensorrt", "tensorrt-ep")]
    expected = [finding for finding in reports[0].findings if finding.rule != "R3"]
    assert list(reports[1].findings) == expected
    assert reports[1].notes == reports[0].notes


def test_a_report_names_the_target(check):
    assert str(check(CONV, target="tensorrt-ep")).endswith("for tensorrt-ep: 0 errors, 0 warnings, 0 notes")
