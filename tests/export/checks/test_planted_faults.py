"""Every check fires on the fault it is for, and no other check does."""

import planted_in_layers
import planted_in_placement
import planted_in_quantizers
import pytest

from fakequant.export.checks import checks_for

PLANTED = [
    *(*planted_in_quantizers.ZERO_POINTS, *planted_in_quantizers.SCALES, *planted_in_quantizers.CODES),
    *(*planted_in_layers.WEIGHTS, *planted_in_layers.LAYERS),
    *(*planted_in_placement.OPERATORS, *planted_in_placement.PLACEMENT, *planted_in_placement.ATTENTIONS),
]
CHECKS = checks_for("tensorrt")


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_the_fault_is_found_and_no_other(check, planted):
    report = check(planted.text, planted.opset)
    found = [(finding.rule, finding.severity.name.lower()) for finding in (*report.findings, *report.notes)]
    assert found == [(planted.rule, planted.severity)]
    (finding,) = report.notes if planted.severity == "info" else report.findings
    assert planted.words in finding.problem
    assert finding.advice


@pytest.mark.parametrize("registered", CHECKS, ids=lambda registered: registered.name)
def test_every_check_has_a_planted_fault(registered):
    assert registered.name in {planted.check for planted in PLANTED}


def test_every_planted_fault_names_a_check():
    assert {planted.check for planted in PLANTED} <= {registered.name for registered in CHECKS}


@pytest.mark.parametrize("registered", CHECKS, ids=lambda registered: registered.name)
def test_every_check_says_where_its_rule_comes_from(registered):
    assert registered.find.__doc__.startswith("Source: ") or registered.name == "R30 float_layer"
    assert not registered.advice.endswith(".")
