"""The command behind the table of accuracies in docs/benchmarks.md, on the formats that have a bar to hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMAND = Path(__file__).with_name("accuracy")
FORMATS = ["int8, max", "int8 affine", "int8 dynamic", "4 bits", "4 bits, PACT", "4 bits, LSQ+", "ternary weights"]
FORMATS += ["binary, XNOR"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    file = tmp_path_factory.mktemp("accuracy") / "outcomes.json"
    run = subprocess.run(
        [sys.executable, COMMAND, *FORMATS, "--json", file], capture_output=True, text=True, check=False
    )
    assert file.is_file(), run.stdout + run.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_loses_no_more_than_its_bar(outcomes, name):
    found = outcomes[name]
    assert found["float"] > 98.5
    assert found["float"] - found["quantized"] <= found["bar"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_is_as_accurate(outcomes, name):
    # With graph optimizations a code may move by a step, and with it one image of 1797 near a boundary.
    assert outcomes[name]["in_file"] == pytest.approx(outcomes[name]["quantized"], abs=0.06)


@pytest.mark.parametrize("name", ["ternary weights", "binary, XNOR"])
def test_training_recovers_what_few_bits_lose(outcomes, name):
    assert outcomes[name]["quantized"] > outcomes[name]["untrained"] + 15
