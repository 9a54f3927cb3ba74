"""Recurrent layers and cells in a model that is quantized with an example."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fakequant as fq
from fakequant.call_sites import Role, record

TARGETS = pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])


class Network(nn.Module):
    """A convolution, packed sequences through a layer, a cell over the steps, a linear layer."""

    def __init__(self, hidden: int = 300) -> None:
        super().__init__()
        self.conv, self.lstm = nn.Conv1d(16, 16, 3, padding=1), nn.LSTM(16, 16, bidirectional=True, batch_first=True)
        self.cell, self.fc = nn.GRUCell(32, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(x).relu().transpose(1, 2)
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        x, state = pad_packed_sequence(packed, batch_first=True)[0], None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.fc(state)


def example(length: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, length), torch.tensor([2, length, 1])


def planned(
    recipe: fq.Recipe | str = "int8", target: str = "tensorrt", hidden: int = 300
) -> dict[str, tuple[bool, str]]:
    """Return {edge: (whether it is quantized, reason)} of the layer and the cell."""
    report = fq.plan(Network(hidden), example(), target, recipe).report
    edges = {edge.name: (edge.descriptor is not None, edge.reason) for edge in report.edges}
    return {name: found for name, found in edges.items() if name.startswith(("lstm", "cell"))}


WEIGHTS = [f"lstm.weight_{of}_l0{suffix}" for of in ("ih", "hh") for suffix in ("", "_reverse")]


@TARGETS
def test_a_layer_stays_float_with_all_of_its_weights_and_says_why(target):
    found = planned(target=target)
    reason = "ONNX's operator runs in float inside on every target; Q and DQ would only slow it down (R46)"
    for edge in ("lstm.input", *WEIGHTS):
        assert found[edge] == (False, reason)
    layers = {layer.name: layer for layer in fq.plan(Network(), example(), target).report.layers}
    assert "R46" in layers["lstm"].reason


@TARGETS
@pytest.mark.parametrize(
    "rule", [fq.Rule(type="LSTM"), fq.Rule("lstm"), fq.Rule(force=True)], ids=["type", "name", "force"]
)
def test_a_rule_quantizes_input_and_weights(target, rule):
    recipe = fq.preset("int8") + rule
    found = planned(recipe, target)
    assert all(found[edge][0] for edge in ("lstm.input", *WEIGHTS))
    fq.quantize(model := Network(), recipe, example_inputs=example(), target=target)
    assert {q.descriptor for _, q in model.lstm.weight_quantizers()} == {
        fq.QuantDescriptor(8, axis=0, narrow_range=True)
    }
    assert all(q.is_enabled for q in (*model.lstm.input_quantizers(), *dict(model.lstm.weight_quantizers()).values()))


CELL = ["cell.input", "cell.hidden", "cell.weight_ih", "cell.weight_hh"]


# A weight of the input is [3 * hidden, 32]: 65536 elements from hidden 683 on.
@pytest.mark.parametrize(
    ("target", "hidden", "reason"),
    [
        ("tensorrt", 300, ""),
        ("tensorrt", 8, "8 inputs, 24 outputs: fewer than 16"),
        ("onnxruntime", 700, ""),
        ("onnxruntime", 300, "a weight of 32 x 900: integer products of cells pay from 65536 elements on"),
    ],
)
def test_a_cell_is_quantized_where_both_products_gain(target, hidden, reason):
    found = planned(target=target, hidden=hidden)
    assert {found[edge][0] for edge in CELL} == {not reason}
    assert not reason or {found[edge][1] for edge in CELL} == {found["cell.input"][1]}
    assert reason in found["cell.input"][1]


def test_a_cell_that_never_gets_a_state_has_a_range_for_it_too():
    model, recipe = nn.Sequential(nn.RNNCell(16, 16)), fq.preset("int8") + fq.Rule(force=True)
    fq.quantize(model, recipe, example_inputs=torch.randn(2, 16), target="onnxruntime")
    assert model[0]._hidden_quantizer.is_enabled


@TARGETS
def test_one_range_serves_every_step_also_more_than_in_the_example(target):
    model = Network(700).eval()
    fq.quantize(model, example_inputs=example(4), target=target)
    fq.calibrate(model, [example(4)], progress=False, forward=lambda model, args: model(*args))
    assert all(isinstance(quantizer, fq.TensorQuantizer) for quantizer in model.cell.input_quantizers())
    assert model(*example(9)).shape == (3, 16)


@pytest.mark.parametrize("preset", ["dynamic", "dynamic-per-token", "fp8"])
def test_presets_quantize_every_tensor_of_a_cell(preset):
    fq.quantize(model := Network(), preset, example_inputs=example())
    weight = fq.preset(preset).decide("cell", "GRUCell").weight
    assert {q.descriptor for _, q in model.cell.weight_quantizers()} == {weight}
    assert {q.descriptor for q in model.cell.input_quantizers()} == {fq.preset(preset).decide("cell", "GRUCell").input}
    assert type(model.lstm) is nn.LSTM


def test_a_convolution_in_front_of_a_float_layer_stays_float_in_onnxruntime():
    """It wants a Q behind a convolution, and what a float LSTM reads carries none."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv1d(16, 16, 3), nn.LSTM(16, 16)

        def forward(self, x):
            return self.lstm(self.conv(x).permute(2, 0, 1))[0]

    report = fq.plan(Model(), torch.randn(2, 16, 8), "onnxruntime").report
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "read without a quantizer" in reasons["conv"]


def test_a_packed_sequence_is_an_activation():
    graph = record(Network(), example())
    (call,) = [call for call in graph.calls if call.role is Role.RECURRENT]
    assert call.operands[0].is_activation
    assert [value.is_constant for value in call.operands[1:]] == [True] * 4


def test_the_function_is_the_layer():
    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(16, 16)

        def forward(self, x):
            return torch.gru(x, x.new_zeros(1, 2, 16), self.layer._flat_weights, True, 1, 0.0, False, False, False)[0]

    (layer,) = [one for one in fq.plan(Function(), (torch.randn(3, 2, 16),)).report.layers if one.name == "gru_0"]
    assert (layer.type, layer.is_quantized) == ("GRU", False)
    assert "R46" in layer.reason


@TARGETS
def test_a_model_for_one_target_serves_the_other(target, tmp_path):
    model, args = Network().eval(), example()
    fq.quantize(model, example_inputs=args, target="tensorrt")
    fq.calibrate(model, [args], progress=False, forward=lambda model, args: model(*args))
    report = fq.export_onnx(model, args, tmp_path / "m.onnx", target=target, opset=17)
    names = {name for name in report.quantizers if name.startswith("cell")}
    assert len(names) == (4 if target == "tensorrt" else 0), "too small for integers in ONNX Runtime"
    found = fq.validate_onnx(tmp_path / "m.onnx", model, [args], inputs=lambda args: args)
    assert found.simulated.max_steps <= 1
    assert found.simulated.sqnr_db > 50
