"""A model beyond the 2 GiB of a protobuf: its files, and the memory that they take to make and to use.

In a process of its own: the peak of a process never falls.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = """
import gc, json, resource, sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import fakequant as fq

WIDTH, DEPTH = 8840, 8


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What one layer needed is given back, and no weight is dequantized before its layer.
    options.enable_cpu_mem_arena, options.execution_order = False, onnxruntime.ExecutionOrder.PRIORITY_BASED
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


torch.manual_seed(0)
model, x = Stack().eval(), torch.randn(2, WIDTH)
fq.quantize(model)
columns = x[0]
for layer in model.layers:  # of rank 1: random numbers for all of it would take long, and so its product is known
    rows = torch.randn(WIDTH)
    torch.outer(rows, columns / WIDTH, out=layer.weight.data)
    layer.weight_quantizer.amax = (rows.abs() * columns.abs().max() / WIDTH)[:, None]
    layer.input_quantizer.amax = torch.tensor(4.5)
    expected = rows * (1.0 if layer is model.layers[0] else expected @ columns / WIDTH)
    columns = rows
size = 4 * DEPTH * WIDTH**2
folder = Path(sys.argv[1])
floats, codes = folder / "float.onnx", folder / "int8.onnx"
reports = [
    fq.export_onnx(model, (x,), floats, weights="float", opset=18),
    fq.export_onnx(model, (x,), codes, weights="int8", opset=17),
]
peaks = {"export": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / size}
del model, layer
gc.collect()
findings = [str(finding) for path in (floats, codes) for finding in fq.check_onnx(path).findings]
outputs = [run(path, x)[0] for path in (floats, codes)]
peaks["check and run"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / size
print(json.dumps({
    "size": size,
    "files": {file.name: file.stat().st_size for file in folder.iterdir()},
    "reports": [report.size for report in reports],
    "peaks": peaks,
    "findings": findings,
    "difference": float(np.abs(outputs[0] - outputs[1]).max()),
    "error": float(np.abs(outputs[0] - expected.numpy()).max() / expected.abs().max()),
}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large():
    """Return what the script found, with the model and its files gone."""
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss has another unit there")
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 6e9:
            pytest.skip("needs 6 GB on the disk")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, folder],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_model_is_of_the_size_that_is_meant(large):
    assert large["size"] > 2.5e9


def test_float_weights_are_beside_the_graph(large):
    assert set(large["files"]) == {"float.onnx", "float.onnx.data", "int8.onnx"}
    assert large["files"]["float.onnx.data"] >= large["size"]
    assert large["files"]["float.onnx"] < 1e5


def test_the_reports_count_the_data(large):
    files = large["files"]
    assert large["reports"] == [files["float.onnx"] + files["float.onnx.data"], files["int8.onnx"]]


def test_the_files_are_ready_for_their_target(large):
    assert large["findings"] == []


def test_onnxruntime_computes_the_product(large):
    assert large["error"] < 0.02


def test_onnxruntime_computes_the_same_from_floats_and_from_codes(large):
    assert large["difference"] == 0


def test_the_peak_of_memory_is_two_and_a_half_times_the_model(large):
    # Of the whole process, the torch model and the interpreter in it.
    assert max(large["peaks"].values()) <= 2.5, large["peaks"]
