"""What leaves the process: files in another one, which never quantized, and exported graphs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fakequant as fq

pytestmark = pytest.mark.slow

CODE = """
import importlib.util, json, pathlib, sys
import torch
import fakequant as fq

name, file, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums depend on it
spec = importlib.util.spec_from_file_location(name, file)
models = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
found = {}
for number, (case_name, case) in enumerate(models.CASES.items()):
    path = pathlib.Path(folder) / f"{number}.safetensors"
    model = fq.load_quantized(case.float_model(seed=1), path).eval()
    found[case_name] = torch.equal(model(case.batch()), torch.load(path.with_suffix(".pt"), weights_only=True))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def same_elsewhere(saved_models, tmp_path_factory):
    """Return for each case whether a model that was loaded in a new process gave the same output there."""
    folder = tmp_path_factory.mktemp("saved")
    for number, case in enumerate(saved_models.CASES.values()):
        model = case.model()
        fq.save_quantized(model, folder / f"{number}.safetensors")
        torch.save(model.eval()(case.batch()), folder / f"{number}.pt")
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            CODE,
            saved_models.__name__,
            saved_models.__file__,
            folder,
            str(torch.get_num_threads()),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(fq.__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_model_is_the_same_in_a_new_process(case, request, same_elsewhere):
    assert same_elsewhere[request.node.callspec.id]


def test_the_exported_file_is_the_same_also_for_another_target(saved_models, tmp_path):
    pytest.importorskip("onnx_ir")
    case = saved_models.CASES["placed"]
    model, x = case.model(), case.batch()
    fq.save_quantized(model, tmp_path / "model.safetensors")
    other = fq.load_quantized(case.float_model(seed=1), tmp_path / "model.safetensors")
    for each, name in ((model, "one.onnx"), (other, "other.onnx")):
        fq.export_onnx(each, (x,), tmp_path / name, target="onnxruntime")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()
