"""The command behind docs/coverage.md, on an architecture of each kind: unseen models go the whole way, unedited."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("coverage")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "edgenext_xx_small", "yolov8n", "electra"])
def test_an_architecture_goes_the_whole_way(name):
    run = subprocess.run([sys.executable, COMMAND, name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 of 1 are through it without a fault" in run.stdout
