"""Files with recurrent layers: one ONNX op for each stacked layer, that computes what torch does."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import fakequant as fq
from fakequant.errors import ExportError
from fakequant.export.graph import constant_of

IN, H = 5, 7
OPSETS = pytest.mark.parametrize("opset", [13, 20])
"""One of each exporter of torch. The one of opset 20 takes ten times as long: it gets a case of each kind."""

CLASSES = pytest.mark.parametrize(
    ("cls", "opset"),
    [(nn.LSTM, 13), (nn.GRU, 13), (nn.RNN, 13), (nn.GRU, 20)],
    ids=["LSTM-13", "GRU-13", "RNN-13", "GRU-20"],
)

DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
QUANTIZE = fq.preset("int8") + fq.Rule(type="*")


def run(path: Path, *args: Tensor, optimized: bool = False) -> list[np.ndarray]:
    """Run a file in ONNX Runtime; knows nothing of fakequant."""
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in args), strict=True)))


def assert_equal_to_torch(path: Path, model: nn.Module, *args: Tensor) -> None:
    with torch.no_grad():
        expected = [leaf.numpy() for leaf in pytree.tree_leaves(model(*args))]
    for optimized in (False, True):
        found = run(path, *args, optimized=optimized)
        assert [array.shape for array in found] == [array.shape for array in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def calibrated(model: nn.Module, *args: Any, recipe: fq.Recipe | None = QUANTIZE) -> nn.Module:
    model.eval()
    if recipe is not None:
        fq.quantize(model, recipe)
        fq.calibrate(model, [args], progress=False, forward=lambda model, args: model(*args))
    return model


def nodes(path: Path) -> list[ir.Node]:
    return [node for node in ir.load(path).graph if node.op_type != "Constant"]


def counts(path: Path) -> dict[str, int]:
    return dict(Counter(node.op_type for node in nodes(path)))


@dataclasses.dataclass(frozen=True)
class Variant:
    label: str
    kwargs: dict[str, Any]
    has_state: bool
    ops: dict[str, int]
    """Expected besides the layer itself, and besides Q and DQ of the input."""

    def args(self, cls: type[nn.Module], length: int, batch: int) -> tuple[Any, ...]:
        x = torch.randn(*((batch, length) if self.kwargs.get("batch_first") else (length, batch)), IN)
        if not self.has_state:
            return (x,)
        h, c = (torch.randn(4, batch, H) for _ in range(2))
        return x, ((h, c) if cls is nn.LSTM else h)

    def shapes(self, cls: type[nn.Module]) -> tuple[Any, ...]:
        length, batch = torch.export.Dim("length"), torch.export.Dim("batch")
        x = {0: batch, 1: length} if self.kwargs.get("batch_first") else {0: length, 1: batch}
        state = {1: batch}
        return (x, (state, state) if cls is nn.LSTM else state) if self.has_state else (x,)

    def __str__(self) -> str:
        return self.label


VARIANTS = [
    Variant("plain", {}, False, {"Squeeze": 1}),
    Variant("no bias", {"bias": False}, False, {"Squeeze": 1}),
    Variant("deep", DEEP, True, {}),
]


# torch's own exporter of opset 20 unrolls nn.RNN, and cannot fold gates behind a quantizer.
_OF_OPSET_20 = {(nn.RNN, "plain", False), (nn.LSTM, "deep", True)}


def _cases() -> Iterator[Any]:
    for cls in (nn.LSTM, nn.GRU, nn.RNN):
        for variant in VARIANTS:
            for is_quantized in (False, True):
                kind = f"{cls.__name__}-{variant}-{'quantized' if is_quantized else 'float'}"
                yield pytest.param(cls, variant, is_quantized, 13, id=f"{kind}-13")
                marks = [] if (cls, variant.label, is_quantized) in _OF_OPSET_20 else [pytest.mark.slow]
                if not marks or (is_quantized and variant.label != "no bias"):
                    yield pytest.param(cls, variant, is_quantized, 20, id=f"{kind}-20", marks=marks)


@pytest.mark.parametrize(("cls", "variant", "is_quantized", "opset"), list(_cases()))
def test_file_computes_what_torch_does_at_other_sizes(cls, variant, is_quantized, opset, tmp_path):
    args, path = variant.args(cls, 4, 3), tmp_path / "m.onnx"
    model = calibrated(cls(IN, H, **variant.kwargs), *args, recipe=QUANTIZE if is_quantized else None)
    fq.export_onnx(model, args, path, opset=opset, dynamic_shapes=variant.shapes(cls))
    found = counts(path)
    assert found.pop(cls.__name__) == variant.kwargs.get("num_layers", 1)
    qdq = {"QuantizeLinear": 1, "DequantizeLinear": 1} if is_quantized else {}
    assert {op: found.get(op) for op in qdq} == qdq, "Q and DQ in front of the first layer, and nowhere else"
    assert not {"Loop", "Scan", "Tanh", "MatMul", "Gemm", "Expand", "ConstantOfShape"} & set(found)
    if variant.ops:
        assert found == qdq | variant.ops
    for given in (args, variant.args(cls, 1, 3), variant.args(cls, 9, 2)):
        leaves = pytree.tree_leaves(given)
        # The inputs of the file are the leaves, in the order of forward's arguments.
        with torch.no_grad():
            expected = [leaf.numpy() for leaf in pytree.tree_leaves(model(*given))]
        for one, other in zip(run(path, *leaves), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@OPSETS
def test_rnn_with_relu(opset, tmp_path):
    x = torch.randn(4, 3, IN)
    model = calibrated(nn.RNN(IN, H, nonlinearity="relu", bidirectional=True), x)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    assert_equal_to_torch(tmp_path / "m.onnx", model, x)


@CLASSES
def test_unbatched_input(cls, opset, tmp_path):
    x = torch.randn(4, IN)
    model = calibrated(cls(IN, H, bidirectional=True), x)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    assert_equal_to_torch(tmp_path / "m.onnx", model, x)


GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}
"""From ONNX's operator documentation (iofc, zrh) and torch's (ifgo, rzn)."""


def in_onnx_order(name: str, array: np.ndarray) -> np.ndarray:
    return np.concatenate([np.split(array, len(GATES[name]))[gate] for gate in GATES[name]])


@CLASSES
def test_weights_in_the_file_are_floats_that_equal_the_quantized_ones(cls, opset, tmp_path):
    x = torch.randn(4, 3, IN)
    model = calibrated(cls(IN, 64, bidirectional=True), x)  # more elements than torch folds by itself
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    (layer,) = [node for node in nodes(tmp_path / "m.onnx") if node.op_type == cls.__name__]
    for index, of in ((1, "ih"), (2, "hh")):
        expected = []
        for suffix in ("l0", "l0_reverse"):
            weight = getattr(model, f"weight_{of}_{suffix}").detach().numpy()
            scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
            expected.append(in_onnx_order(cls.__name__, np.rint(weight / scale) * scale))
        np.testing.assert_array_equal(constant_of(layer.inputs[index]), np.stack(expected))
    biases = {name: in_onnx_order(cls.__name__, value.detach().numpy()) for name, value in model.named_parameters()}
    rows = [np.concatenate([biases[f"bias_{of}_{suffix}"] for of in ("ih", "hh")]) for suffix in ("l0", "l0_reverse")]
    np.testing.assert_array_equal(constant_of(layer.inputs[3]), np.stack(rows))


@pytest.mark.parametrize(
    "grid",
    [
        fq.QuantDescriptor(4, block_size=4, dynamic=True),
        pytest.param(fq.QuantDescriptor(8, unsigned=True, affine=True), marks=pytest.mark.slow),
        pytest.param(fq.QuantDescriptor((4, 3)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_of_other_grids(grid, tmp_path):
    x = torch.randn(4, 3, 8)
    model = calibrated(nn.GRU(8, 8), x, recipe=fq.Recipe() + fq.Rule(weight=grid))
    fq.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert counts(tmp_path / "m.onnx") == {"QuantizeLinear": 1, "DequantizeLinear": 1, "GRU": 1, "Squeeze": 1}
    assert_equal_to_torch(tmp_path / "m.onnx", model, x)


def test_a_weight_that_a_linear_layer_shares_is_quantized_in_both(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(16, 16), nn.Linear(16, 64)
            self.fc.weight = self.lstm.weight_ih_l0

        def forward(self, x):
            return self.fc(self.lstm(x)[0])

    model, x = Tied().eval(), torch.randn(4, 3, 16)
    fq.quantize(model, fq.preset("int8") + fq.Rule(force=True), example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    assert model.fc.weight_quantizer is model.lstm._weight_ih_l0_quantizer
    report = fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=13)
    assert report.integer_weights == 1
    assert_equal_to_torch(tmp_path / "m.onnx", model, x)


# Packed sequences.


class Packed(nn.Module):
    """A layer over padded sequences of different lengths."""

    def __init__(self, layer: nn.RNNBase, is_sorted: bool = False, padding_value: float = 0.0, more: int = 0) -> None:
        super().__init__()
        self.layer, self.is_sorted, self.padding_value, self.more = layer, is_sorted, padding_value, more

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x, lengths, first, enforce_sorted=self.is_sorted)
        output, states = self.layer(packed)
        total = x.shape[1 if first else 0] + self.more
        return pad_packed_sequence(output, first, self.padding_value, total_length=total), states


def padded(model: Packed, length: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    x = torch.randn(length, len(lengths), IN)
    return x.transpose(0, 1).contiguous() if model.layer.batch_first else x, torch.tensor(lengths)


PACKED: dict[str, Callable[[type[nn.RNNBase]], Packed]] = {
    "unsorted": lambda cls: Packed(cls(IN, H, **DEEP)),
    "sorted": lambda cls: Packed(cls(IN, H), is_sorted=True),
    "other padding": lambda cls: Packed(cls(IN, H), padding_value=-3.0),
    "longer output": lambda cls: Packed(cls(IN, H), padding_value=2.0, more=2),
}


@pytest.mark.parametrize(
    ("cls", "kind", "opset"),
    [
        *((nn.LSTM, kind, 13) for kind in PACKED),
        *((cls, "unsorted", 13) for cls in (nn.GRU, nn.RNN)),
        *((nn.LSTM, kind, 20) for kind in ("unsorted", "longer output")),
    ],
)
def test_packed_sequences_with_lengths_as_an_input(cls, kind, opset, tmp_path):
    model, path = PACKED[kind](cls), tmp_path / "m.onnx"
    args = padded(model, 5, [5, 3, 2] if kind == "sorted" else [2, 5, 3])
    calibrated(model, *args)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {0: batch, 1: length} if model.layer.batch_first else {0: length, 1: batch}
    fq.export_onnx(model, args, path, opset=opset, dynamic_shapes=(shapes, {0: batch}))
    layers = [node for node in nodes(path) if node.op_type == cls.__name__]
    assert len(layers) == model.layer.num_layers
    assert all(node.inputs[4] is not None for node in layers), "sequence_lens"
    others = padded(model, 6, [6, 1]), padded(model, 7, [4, 2] if kind == "sorted" else [2, 4])
    for given in (args, *others):
        assert_equal_to_torch(path, model, *given)


def test_packed_data_may_be_changed_before_it_is_padded(tmp_path):
    class Doubled(Packed):
        def forward(self, x, lengths):
            output, _ = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output = PackedSequence(output.data + 1, *output[1:])
            return pad_packed_sequence(output, total_length=x.shape[0])[0]

    model = Doubled(nn.GRU(IN, H))
    args = padded(model, 5, [2, 5, 3])
    calibrated(model, *args)
    fq.export_onnx(model, args, tmp_path / "m.onnx", opset=13)
    assert_equal_to_torch(tmp_path / "m.onnx", model, *args)


def test_validation_of_packed_sequences(tmp_path):
    model = PACKED["unsorted"](nn.LSTM)
    args = padded(model, 5, [2, 5, 3])
    calibrated(model, *args)
    fq.export_onnx(model, args, tmp_path / "m.onnx", opset=13)
    report = fq.validate_onnx(tmp_path / "m.onnx", model, [args], inputs=lambda args: args)
    assert report.optimized.sqnr_db > 100


# What is refused, and that nothing is left behind.


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@OPSETS
def test_projections_are_refused(opset, tmp_path):
    x = torch.randn(4, 3, IN)
    model = calibrated(nn.Sequential(nn.LSTM(IN, H, proj_size=2)), x)
    with pytest.raises(ExportError, match=r"^0: expected proj_size 0, for ONNX's LSTM has no projection, got 2"):
        fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    assert not (tmp_path / "m.onnx").exists()


@OPSETS
def test_packed_sequences_from_outside_are_refused(opset, tmp_path):
    packed = pack_padded_sequence(torch.randn(4, 2, IN), torch.tensor([4, 2]))
    model = calibrated(nn.LSTM(IN, H), packed)
    with pytest.raises(ExportError, match=r"^PackedSequence: expected one that pack_padded_sequence makes"):
        fq.export_onnx(model, (packed,), tmp_path / "m.onnx", opset=opset)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(IN, H)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm(x)
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_torch_are_left_as_they_were(fails, tmp_path):
    x, forwards = torch.randn(4, 3, IN), [cls.forward for cls in (nn.LSTM, nn.GRU, nn.RNN)]
    model = Failing().eval()
    calibrated(model.lstm, x)
    before, parameters = model.lstm(x)[0], dict(model.named_parameters())
    if fails:
        with pytest.raises(ExportError, match="on purpose"):
            fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=13)
    else:
        fq.export_onnx(model.lstm, (x,), tmp_path / "m.onnx", opset=13)
    assert [cls.forward for cls in (nn.LSTM, nn.GRU, nn.RNN)] == forwards
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model.lstm(x)[0], before)


# Reports.


def test_reports_name_the_layer_and_the_reason(tmp_path):
    x = torch.randn(4, 3, IN)
    model = calibrated(nn.Sequential(nn.LSTM(IN, H)), x)
    report = fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime", opset=13)
    assert report.quantizers == tuple(f"0._{name}_quantizer" for name in ("input", "weight_ih_l0", "weight_hh_l0"))
    assert (report.not_in_file, report.integer_weights) == ((), 0)
    assert "runs in float inside" in report.float_ops["0 (LSTM)"]
    assert "floats on their grids" in report.float_ops["0 (LSTM)"]
    (op,) = [op for op in fq.export.inspect_onnx(tmp_path / "m.onnx").ops if op.op_type == "LSTM"]
    assert (op.module, op.kernel, op.is_integer, op.has_qdq) == ("0", "LSTM", False, True)
    assert "not in the file" not in str(fq.export.compare(model, tmp_path / "m.onnx", x))
    assert op.reason == "LSTM has no integer kernel; Q and DQ in front of it only round its input"


@CLASSES
def test_validation(cls, opset, tmp_path):
    x = torch.randn(4, 3, IN)
    model = calibrated(cls(IN, H, num_layers=2), x)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", opset=opset)
    report = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert (report.simulated.max_steps, report.optimized.max_steps) == (0, 0)
    assert report.simulated.sqnr_db > 100


# Cells.


class Loop(nn.Module):
    """A cell over a fixed number of steps; the first starts without a state."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        state = None
        for t in range(x.shape[0]):
            state = self.cell(x[t], state)
        return state


@pytest.mark.parametrize(("cls", "opset"), [(nn.LSTMCell, 13), (nn.GRUCell, 13), (nn.RNNCell, 13), (nn.GRUCell, 20)])
def test_cells_are_two_integer_products_a_step(cls, opset, tmp_path, integer_ops):
    x = torch.randn(3, 4, 32)
    model = Loop(cls(32, 16)).eval()
    fq.quantize(model, fq.preset("int8") + fq.Rule(force=True), example_inputs=x, target="onnxruntime")
    fq.calibrate(model, [x], progress=False)
    fq.export_onnx(model, (x,), tmp_path / "m.onnx", target="onnxruntime", opset=opset)
    assert integer_ops(tmp_path / "m.onnx")["QGemm"] == 6
    report = fq.validate_onnx(tmp_path / "m.onnx", model, [x])
    assert report.simulated.max_steps <= 1
    assert report.simulated.sqnr_db > 50
    assert report.optimized.max_steps <= 2
