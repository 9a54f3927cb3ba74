"""4 processes, started once, run every case of cases.py; tests look at what each of them left."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Found = Callable[[str, int | str], dict]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return a function: (case, rank or "alone") -> what that process left."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("cases.py")
    with subprocess.Popen(
        [sys.executable, script, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            output, _ = started.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the processes too, which wait for each other
            raise
    assert started.returncode == 0, output
    return lambda case, rank: torch.load(folder / f"{case}.{rank}.pt")
