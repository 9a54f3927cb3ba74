"""Files of torch's transformers with a mask, which torch looks into unless it is told whether it is causal."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fakequant as fq

LENGTH, E = 5, 16
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
BAND = torch.zeros(LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(2).bool(), -torch.inf)


class Decoder(nn.Module):
    """A decoder layer that gets a mask for its target, and attends to the same."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 2, 16, batch_first=True), 1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x, tgt_mask=self.mask)


@pytest.mark.parametrize("mask", [CAUSAL, BAND], ids=["causal", "band"])
def test_a_masked_decoder_is_exported(mask, tmp_path):
    model, x = Decoder(mask).eval(), torch.randn(2, LENGTH, E)
    fq.quantize(model, example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "decoder.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=0, atol=1e-5)


def test_torch_looks_into_masks_again_after_an_export(tmp_path):
    before = nn.modules.transformer._detect_is_causal_mask
    fq.export_onnx(nn.Linear(2, 2), (torch.randn(1, 2),), tmp_path / "linear.onnx", opset=17)
    assert nn.modules.transformer._detect_is_causal_mask is before
