"""torch's own exporters, without fakequant's: the graph gives what torch gives."""

import warnings

import onnxruntime
import pytest
import torch

from fakequant.descriptor import QuantDescriptor
from fakequant.schemes import scheme_for
from fakequant.schemes.scheme import SCHEMES


class Weight(torch.nn.Module):
    def __init__(self, grid):
        super().__init__()
        self.grid, self.weight = grid, torch.nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ scheme_for(self.grid).fake_quantize(self.weight, self.grid)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_exported(name, dynamo, tmp_path):
    grid = QuantDescriptor(max(SCHEMES[name].num_bits), scheme=name)
    model, x, file = Weight(grid), torch.randn(2, 3), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's exporters say about themselves
        torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False, input_names=["x"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model(x).detach())
