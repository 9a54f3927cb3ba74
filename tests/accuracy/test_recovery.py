"""What training brings back with 4 bits, on one seed; the whole table is made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_training_brings_back_nine_tenths_of_what_calibration_lost(tmp_path):
    command = [sys.executable, Path(__file__).with_name("recovery.py"), "4", "--seeds", "0", "--json"]
    subprocess.run([*command, tmp_path / "found.json"], check=True, capture_output=True)
    ((found,),) = json.loads((tmp_path / "found.json").read_text()).values()
    lost = found["float"] - found["PTQ"]
    assert lost > 5
    for way in ("fixed ranges", "learned ranges", "learned ranges, distilled"):
        assert found[way] > found["PTQ"] + 0.9 * lost, way
