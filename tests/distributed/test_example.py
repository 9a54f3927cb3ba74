"""examples/calibrate_distributed.py as docs/distributed.md says it is run."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fakequant as fq

SCRIPT = Path(__file__).parents[2] / "examples" / "calibrate_distributed.py"


@pytest.mark.slow
def test_torchrun_gives_the_ranges_of_one_process(tmp_path):
    path = tmp_path / "ranges.safetensors"
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "method entropy, 8 batches" in ended.stdout
    assert ended.stderr.count("calibrate: 100%") == 1  # one bar, not two
    expected = one_process(tmp_path / "alone.safetensors")
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def one_process(path: Path) -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("calibrate_distributed", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.float_model()
    fq.quantize(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    try:
        fq.calibrate(model, itertools.chain(example.share(0, 2), example.share(1, 2)), "entropy", progress=False)
    finally:
        torch.set_num_threads(threads)
    fq.save_amax(model, path)
    return load_file(path)
