"""Files with DynamicQuantizeLSTM: ONNX Runtime against torch, and against the operator in NumPy."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import fakequant as fq
from fakequant.errors import ExportError
from fakequant.export.graph import constant_of
from fakequant.nn.modules.recurrent import UINT8_OF_CALL

IN, H, T, N = 6, 9, 5, 3
DEEP = {"num_layers": 2, "bidirectional": True}


def run(path: Path, *args: Tensor, threads: int = 1, optimized: bool = False) -> list[np.ndarray]:
    """Run a file in ONNX Runtime; knows nothing of fakequant."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in args), strict=True)))


def outputs_of(model: nn.Module, *args: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [leaf.numpy() for leaf in pytree.tree_leaves(model(*args))]


def assert_close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def quantized(model: nn.Module, recipe: fq.Recipe | str = "dynamic-lstm") -> nn.Module:
    fq.quantize(model.eval(), recipe)
    return model


def exported(model: nn.Module, args: tuple[Any, ...], path: Path, **options: Any) -> fq.export.ExportReport:
    return fq.export_onnx(model, args, path, **{"target": "onnxruntime", "opset": 13, **options})


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph if node.op_type != "Constant")


def states(layer: nn.LSTM, batch: int) -> tuple[Tensor, Tensor]:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    return torch.randn(count, batch, layer.hidden_size), torch.randn(count, batch, layer.hidden_size)


# The exporter of opset 20 takes ten times as long.
@pytest.mark.parametrize(
    ("kwargs", "opset"),
    [
        ({}, 13),
        ({"bias": False}, 13),
        (DEEP, 13),
        ({**DEEP, "batch_first": True}, 20),
        pytest.param({}, 21, marks=pytest.mark.slow),
        pytest.param(DEEP, 17, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_file_computes_what_torch_does_at_other_sizes(kwargs, opset, tmp_path):
    model, path = quantized(nn.LSTM(IN, H, **kwargs)), tmp_path / "m.onnx"
    first = model.batch_first

    def args(length: int, batch: int) -> tuple[Any, ...]:
        return torch.randn(*((batch, length) if first else (length, batch)), IN) + 0.3, states(model, batch)

    length, batch = torch.export.Dim("length"), torch.export.Dim("batch")
    shapes = ({0: batch, 1: length} if first else {0: length, 1: batch}, ({1: batch}, {1: batch}))
    exported(model, args(T, N), path, opset=opset, dynamic_shapes=shapes)
    found = ops(path)
    assert found["DynamicQuantizeLSTM"] == model.num_layers
    assert not {"LSTM", "DynamicQuantizeLinear", "DequantizeLinear", "QuantizeLinear"} & set(found)
    for given in (args(T, N), args(1, 1), args(7, 6)):
        for optimized in (False, True):
            assert_close(run(path, *pytree.tree_leaves(given), optimized=optimized), outputs_of(model, *given))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_batch(threads, batch, operators, tmp_path):
    model, x = quantized(nn.LSTM(IN, H, **DEEP)), torch.randn(T, batch, IN)
    exported(model, (x,), tmp_path / "m.onnx")
    found, simulated = run(tmp_path / "m.onnx", x, threads=threads), outputs_of(model, x)
    assert_close(found, operators(model, x.numpy(), threads=threads))
    if threads == 1 or batch == 1:
        assert_close(found, simulated)
    else:  # ranges of their own: a step of a hidden state, which is below 1, is up to 2 / 255
        assert 0 < np.abs(found[0] - simulated[0]).max() < 2 / 255


def test_a_sequence_alone(tmp_path):
    model, x = quantized(nn.LSTM(IN, H, bidirectional=True)), torch.randn(T, IN)
    exported(model, (x,), tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x), outputs_of(model, x))


class Packed(nn.Module):
    """A layer over padded sequences of different lengths."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.LSTM(IN, H, **kwargs)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        output, states = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output, total_length=x.shape[0])[0], states


@pytest.mark.parametrize(("kwargs", "opset"), [({}, 13), (DEEP, 13), ({}, 20)], ids=str)
def test_what_is_behind_a_sequence_does_not_count(kwargs, opset, tmp_path):
    model, x = quantized(Packed(**kwargs)), torch.randn(T, N, IN)
    lengths = torch.tensor([2, 5, 3])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {0: length, 1: batch}, {0: batch}
    exported(model, (x, lengths), tmp_path / "m.onnx", opset=opset, dynamic_shapes=shapes)
    longer = torch.full((8, 2, IN), 50.0)
    longer[:4] = torch.randn(4, 2, IN)
    longer[3, 1] = 50.0
    for given in ((x, lengths), (longer, torch.tensor([4, 3]))):
        assert_close(run(tmp_path / "m.onnx", *given), outputs_of(model, *given))


def test_the_file_holds_int8_weights_and_float_biases(tmp_path):
    model, x = quantized(nn.LSTM(IN, 64, bidirectional=True)), torch.randn(T, N, IN)
    exported(model, (x,), tmp_path / "m.onnx")
    file = ir.load(tmp_path / "m.onnx")
    assert file.opset_imports["com.microsoft"] == 1
    (node,) = [node for node in file.graph if node.op_type == "DynamicQuantizeLSTM"]
    assert (node.domain, node.attributes["direction"].as_string()) == ("com.microsoft", "bidirectional")
    inputs = [constant_of(value) for value in node.inputs]
    for index, of in ((1, "ih"), (2, "hh")):
        codes, scales = [], []
        for suffix in ("l0", "l0_reverse"):
            weight = getattr(model, f"weight_{of}_{suffix}").detach().numpy()
            i, f, g, o = np.split(weight, 4)
            weight = np.concatenate([i, o, f, g])
            scales.append(np.abs(weight).max(axis=1) / np.float32(127))
            codes.append(np.rint(weight / scales[-1][:, None]).T)
        assert inputs[index].dtype == np.int8
        np.testing.assert_array_equal(inputs[index], np.stack(codes))
        np.testing.assert_array_equal(inputs[6 + 2 * index], np.stack(scales))
        zero_points = inputs[7 + 2 * index]
        assert (zero_points.dtype, zero_points.shape, zero_points.any()) == (np.int8, (2, 256), False)
    assert (inputs[3].dtype, inputs[3].shape) == (np.float32, (2, 512))
    assert (tmp_path / "m.onnx").stat().st_size < 1.3 * (inputs[1].size + inputs[2].size + 8 * 1024)


def test_static_weights_keep_their_calibrated_ranges(tmp_path):
    model, x = nn.LSTM(IN, H).eval(), torch.randn(T, N, IN)
    fq.quantize(model, fq.preset("dynamic") + fq.Rule(type="LSTM", input=UINT8_OF_CALL))
    fq.calibrate(model, [x], weight_method="mse", progress=False)
    assert not torch.equal(model._weight_hh_l0_quantizer.amax, model.weight_hh_l0.abs().amax(1, keepdim=True))
    exported(model, (x,), tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x), outputs_of(model, x))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_weights_with_one_range_and_of_fewer_bits(num_bits, tmp_path):
    grid = fq.QuantDescriptor(num_bits, dynamic=True, narrow_range=True)
    recipe = fq.preset("dynamic") + fq.Rule(type="LSTM", input=UINT8_OF_CALL, weight=grid)
    model, x = quantized(nn.LSTM(IN, H), recipe), torch.randn(T, N, IN)
    exported(model, (x,), tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x), outputs_of(model, x))


class Tagger(nn.Module):
    """An LSTM that is called twice, and a linear layer that reads the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(IN, IN), nn.Linear(IN, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.lstm(x)[0])[0]) + self.fc(x)


@pytest.mark.parametrize("example", [None, torch.zeros(T, 1, IN)], ids=["without example", "with example"])
def test_a_layer_that_is_called_twice(example, tmp_path):
    model, x = Tagger().eval(), torch.randn(T, 1, IN)
    fq.quantize(model, "dynamic-lstm", example_inputs=example, target="onnxruntime")
    report = exported(model, (x,), tmp_path / "m.onnx")
    found = ops(tmp_path / "m.onnx")
    assert (found["DynamicQuantizeLSTM"], found["MatMulInteger"]) == (2, 2)
    assert report.not_in_file == ()
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).simulated.sqnr_db > 100


def test_with_a_float_hidden_state_it_is_an_lstm_behind_a_rounded_input(tmp_path):
    model, x = quantized(nn.LSTM(IN, H)), torch.randn(T, N, IN)
    model.hidden_quantizer.disable()
    exported(model, (x,), tmp_path / "m.onnx")
    found = ops(tmp_path / "m.onnx")
    assert (found["LSTM"], found["DynamicQuantizeLinear"], found["DequantizeLinear"]) == (1, 1, 1)
    assert_close(run(tmp_path / "m.onnx", x), outputs_of(model, x))


# Reports.


def test_reports_know_it(tmp_path):
    model, x, path = quantized(nn.Sequential(nn.LSTM(IN, H, 2))), torch.randn(T, 1, IN), tmp_path / "m.onnx"
    report = exported(model, (x,), path)
    names = [f"weight_{of}_l{index}" for index in (0, 1) for of in ("ih", "hh")]
    assert set(report.quantizers) == {f"0._{name}_quantizer" for name in ("input", "hidden", *names)}
    assert (report.not_in_file, report.integer_weights, report.float_ops) == ((), 4, {})
    inspected = fq.inspect_onnx(path).integer_ops
    assert [(op.module, op.kernel) for op in inspected] == [("0", "DynamicQuantizeLSTM")] * 2
    validated = fq.validate_onnx(path, model, [x])
    assert (validated.quantized_ops, validated.integer_ops) == (2, 2)
    assert validated.simulated.sqnr_db > 100
    assert "splits a batch between the threads" in str(validated)
    compared = fq.compare(model, path, x)
    assert compared.first_divergence is None
    assert compared.notes == ("Not compared: the codes inside of 2 DynamicQuantizeLSTM.",)
    assert {finding.rule for finding in fq.check_onnx(path).findings} >= {"R12"}, "TensorRT refuses it"


def test_other_files_have_no_note_on_threads(tmp_path):
    model, x = nn.LSTM(IN, H).eval(), torch.randn(T, N, IN)
    exported(model, (x,), tmp_path / "m.onnx")
    assert fq.validate_onnx(tmp_path / "m.onnx", model, [x]).notes == ()


# What is refused, and that nothing is left behind.


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-ep", "onnxruntime-cuda"])
def test_other_targets_refuse_it(target, tmp_path):
    model, x = quantized(nn.Sequential(nn.LSTM(IN, H))), torch.randn(T, N, IN)
    with pytest.raises(ExportError, match=r"expected .* target 'onnxruntime', got a dynamic range.*: 0\._input_q"):
        exported(model, (x,), tmp_path / "m.onnx", target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["input", "weight_hh_l0"])
def test_a_part_that_stays_float_is_refused(name, tmp_path):
    model, x = quantized(nn.Sequential(nn.LSTM(IN, H))), torch.randn(T, N, IN)
    model[0]._modules[f"_{name}_quantizer"].disable()
    with pytest.raises(ExportError, match=rf"^0: expected all quantizers .* got _{name}_quantizer disabled"):
        exported(model, (x,), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "grid",
    [
        fq.QuantDescriptor(8, unsigned=True, dynamic=True),
        fq.QuantDescriptor(8, affine=True, axis=0, dynamic=True),
        fq.QuantDescriptor(4, block_size=3, dynamic=True),
        fq.QuantDescriptor(8, axis=1, dynamic=True),
        fq.QuantDescriptor(12, axis=0, dynamic=True),
        fq.QuantDescriptor((4, 3), dynamic=True),
    ],
    ids=str,
)
def test_weights_that_the_operator_cannot_read_are_refused(grid, tmp_path):
    recipe = fq.preset("dynamic") + fq.Rule(type="LSTM", input=UINT8_OF_CALL, weight=grid)
    model, x = quantized(nn.Sequential(nn.LSTM(IN, H)), recipe), torch.randn(T, N, IN)
    with pytest.raises(ExportError, match=r"^0\.weight_ih_l0: expected int8 codes without zero point, with one scale"):
        exported(model, (x,), tmp_path / "m.onnx", opset=21)
