"""Files of a model whose batch norms are folded."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.export import Session
from fakequant.qat import fold_batchnorm

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Trained for a step, so that statistics are no round numbers; negative gammas too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(392, 32),  # more weights than the optimizer of graphs would fold
        nn.BatchNorm1d(32),
    )
    for norm in model:
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
    fq.quantize(model, fq.preset("int8") + fq.Rule(type="Conv*d", force=True))
    fq.calibrate(model, [X], progress=False)
    assert len(fold_batchnorm(model, X).folded) == 4
    with torch.no_grad():
        model.train()(X)
    return model.eval()


@pytest.mark.parametrize("opset", [None, 17], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_file_has_integer_weights_and_no_batch_norm(model, tmp_path, target, opset):
    file, before = tmp_path / "model.onnx", [type(module) for module in model.modules()]
    fq.export_onnx(model, (X,), file, target=target, opset=opset)
    assert [type(module) for module in model.modules()] == before
    graph = ir.load(file).graph
    ops = Counter(node.op_type for node in graph)
    assert ops["BatchNormalization"] == ops["Mul"] == ops["Sqrt"] == 0
    products = [node for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    weights = [node.inputs[1].producer().inputs[0] for node in products]
    assert [weight.dtype for weight in weights] == [ir.DataType.INT8] * 4
    report = fq.validate_onnx(file, model, [X])
    assert report.simulated.max_steps <= 1


def test_onnxruntime_runs_all_of_it_as_integers(tmp_path):
    convs = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16)).eval()
    fq.quantize(model, example_inputs=X, target="onnxruntime")
    fq.calibrate(model, [X], progress=False)
    assert len(fold_batchnorm(model, X).folded) == 3
    fq.export_onnx(model, (X,), tmp_path / "model.onnx", target="onnxruntime")
    report = fq.inspect_onnx(tmp_path / "model.onnx")
    assert [op.op_type for op in report.integer_ops] == ["Conv", "Conv", "Gemm"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the weight's shape, which is computed here
@pytest.mark.parametrize("dynamo", [True, False])
def test_plain_torch_export_computes_the_same(model, tmp_path, dynamo):
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (X,), file, dynamo=dynamo, verbose=False)
    assert "BatchNormalization" not in {node.op_type for node in ir.load(file).graph}
    session = Session(file, optimized=False)
    (found,) = session.run(dict.fromkeys(session.inputs, X.numpy())).values()
    expected = model(X).detach()
    assert float((torch.from_numpy(found) - expected).abs().max()) < 0.02 * float(expected.abs().max())
