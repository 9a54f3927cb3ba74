"""Quantized recurrent layers and cells: the battery of quantized modules, and NumPy's formulas on the grid."""

import copy
import dataclasses
import functools
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fakequant as fq
from fakequant.descriptor import QUANT_DESC_8BIT_PER_TENSOR
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import QuantLSTM, TensorQuantizer, registered
from fakequant.nn.modules.recurrent import UINT8_OF_CALL

IN, H, T, N = 5, 7, 6, 3
LENGTHS = torch.tensor([4, 6, 2])

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own


@dataclasses.dataclass(frozen=True)
class Case:
    """A class, how it is made, and what it is called with."""

    float_class: type[nn.Module]
    label: str = "plain"
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (T, N, IN)
    has_state: bool = False
    packed: bool | None = None
    """Whether packed sequences are sorted; None for a tensor."""
    grid: fq.QuantDescriptor | None = None
    """Of the input; None for the default."""

    @property
    def is_cell(self) -> bool:
        return issubclass(self.float_class, nn.RNNCellBase)

    @property
    def quantized_class(self) -> Any:
        return dict(registered())[self.float_class]

    def float(self) -> Any:
        return self.float_class(IN, H, **self.kwargs).eval()

    def quantized(self, **kwargs: Any) -> Any:
        return self.quantized_class(IN, H, **{"quant_desc_input": self.grid, **self.kwargs, **kwargs}).eval()

    def pair(self) -> tuple[Any, Any]:
        """Return a float module and a quantized one with the same parameters."""
        float_module, quantized = self.float(), self.quantized()
        quantized.load_state_dict(float_module.state_dict())
        return float_module, quantized

    def calibrated(self) -> tuple[Any, tuple[Any, ...]]:
        module, args = self.quantized(), self.args()
        fq.calibrate(module, [args], progress=False, forward=lambda module, args: module(*args))
        return module, args

    def args(self) -> tuple[Any, ...]:
        x: Any = torch.randn(self.shape)
        if self.packed is not None:
            lengths = LENGTHS.sort(descending=True).values if self.packed else LENGTHS
            first = self.kwargs.get("batch_first", False)
            x = pack_padded_sequence(x.transpose(0, 1) if first else x, lengths, first, enforce_sorted=self.packed)
        if not self.has_state:
            return (x,)
        directions = 2 if self.kwargs.get("bidirectional") else 1
        lead = () if self.is_cell else (self.kwargs.get("num_layers", 1) * directions,)
        batch = () if len(self.shape) == (1 if self.is_cell else 2) else (N,)
        hidden = torch.randn(*lead, *batch, self.kwargs.get("proj_size") or H)
        is_lstm = issubclass(self.float_class, nn.LSTM | nn.LSTMCell)
        return x, (hidden, torch.randn(*lead, *batch, H)) if is_lstm else hidden

    def __str__(self) -> str:
        return f"{self.float_class.__name__}-{self.label}"


def _layer_cases(cls: type[nn.Module]) -> list[Case]:
    case = functools.partial(Case, cls)
    deep = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    return [
        case(),
        case("deep", deep, (N, T, IN), has_state=True),
        case("unbatched", {"bidirectional": True}, (T, IN), has_state=True),
        case("no bias", {"bias": False}),
        case("packed", {**deep, "bias": False}, packed=False, has_state=True),
        case("sorted", {"num_layers": 2}, packed=True),
    ]


LAYERS = [
    *(case for cls in (nn.LSTM, nn.GRU, nn.RNN) for case in _layer_cases(cls)),
    Case(nn.LSTM, "projection", {"proj_size": 4, "num_layers": 2, "bidirectional": True}, has_state=True),
    Case(nn.RNN, "relu", {"nonlinearity": "relu"}),
]
CELLS = [
    case
    for cls in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    for case in (
        Case(cls, shape=(N, IN)),
        Case(cls, "state", shape=(N, IN), has_state=True),
        Case(cls, "unbatched", {"bias": False}, (IN,), has_state=True),
    )
] + [Case(nn.RNNCell, "relu", {"nonlinearity": "relu"}, (N, IN), has_state=True)]
DYNAMIC = [
    dataclasses.replace(case, label=f"dynamic {case.label}", grid=UINT8_OF_CALL) for case in _layer_cases(nn.LSTM)
]
CASES = [*LAYERS, *CELLS, *DYNAMIC]
FIRST = list({case.float_class: case for case in reversed(CASES)}.values())

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
every_cell = pytest.mark.parametrize("case", CELLS, ids=str)
every_class = pytest.mark.parametrize("case", FIRST, ids=str)
every_kind = pytest.mark.parametrize("case", [*FIRST, DYNAMIC[0]], ids=str)


def quantizers(module: nn.Module) -> list[TensorQuantizer]:
    return [child for child in module.modules() if isinstance(child, TensorQuantizer)]


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(actual: Any, expected: Any) -> None:
    pairs = zip(leaves(actual), leaves(expected), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def gradients(module: nn.Module, function: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the gradients of all parameters of a sum of squares of what function gives."""
    module.zero_grad()
    sum(leaf.square().sum() for leaf in leaves(function(*args)) if leaf.is_floating_point()).backward()
    return [parameter.grad for _, parameter in module.named_parameters()]


# What torch's own module does stays as it is.


@every_case
def test_quantizers_off_is_bit_identical_to_torch(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable()
    args = case.args()
    assert_same(quantized(*args), float_module(*args))


@every_case
def test_gradients_with_quantizers_off_are_torchs(case):
    float_module, quantized = case.pair()
    for quantizer in quantizers(quantized):
        quantizer.disable_quant()
    args = case.args()
    found = zip(*(gradients(module, module, args) for module in (float_module, quantized)), strict=True)
    assert all(torch.equal(one, other) for one, other in found)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_is_torchs(cls):
    case = Case(cls, kwargs={"num_layers": 3, "dropout": 0.5})
    modules, args = [module.train() for module in case.pair()], case.args()
    for quantizer in quantizers(modules[1]):
        quantizer.disable()
    outputs = [torch.random.manual_seed(1) and module(*args) for module in modules]
    assert_same(*outputs)
    assert not torch.equal(outputs[0][0], modules[0].eval()(*args)[0])


@every_class
def test_existing_module_is_converted_in_place(case):
    module, args = case.float(), case.args()
    parameters, before = dict(module.named_parameters()), module(*args)
    fq.quantize(module, fq.Recipe() + fq.Rule())
    assert type(module) is case.quantized_class
    assert all(dict(module.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert any(not torch.equal(*pair) for pair in zip(leaves(module(*args)), leaves(before), strict=True))
    assert type(fq.dequantize(module)) is case.float_class
    assert_same(module(*args), before)


@every_class
def test_dtype_and_device_arguments(case):
    module = case.quantized_class(IN, H, dtype=torch.float64, device="meta")
    assert {(parameter.dtype, parameter.device.type) for parameter in module.parameters()} == {(torch.float64, "meta")}
    assert {quantizer._amax.device.type for quantizer in quantizers(module)} == {"meta"}


@every_class
def test_unknown_argument_is_torchs_error(case):
    with pytest.raises(TypeError, match="nonsense"):
        case.quantized(nonsense=1)


# What is quantized: NumPy's formulas, on the grid.


def on_grid(x: Any, amax: Any, lowest: int) -> np.ndarray:
    """Return values on an 8-bit grid by the definition of QuantizeLinear, in float32 as that."""
    x, scale = np.asarray(x, np.float32), np.asarray(amax, np.float32) / np.float32(127)
    return (np.clip(np.rint(x / scale), lowest, 127) * scale).astype(np.float64)


def weight_on_grid(weight: Tensor) -> np.ndarray:
    weight = weight.detach().numpy()
    return on_grid(weight, np.abs(weight).max(axis=1, keepdims=True), -127)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def step(kind: str, of_x: np.ndarray, of_h: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the next states by the formulas in torch's documentation, h as it is where it is no factor of a weight."""
    if kind == "LSTM":
        i, f, g, o = np.split(of_x + of_h, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    if kind == "GRU":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (np.split(part, 3, axis=-1) for part in (of_x, of_h))
        z = sigmoid(z_x + z_h)
        return (1 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h, c
    return (np.maximum(of_x + of_h, 0) if kind == "relu" else np.tanh(of_x + of_h)), c


def kind_of(case: Case) -> str:
    return case.kwargs.get("nonlinearity", case.float_class.__name__.removesuffix("Cell"))


def bias(module: nn.Module, name: str) -> np.ndarray:
    found = getattr(module, name, None)
    return np.zeros(1) if found is None else found.detach().double().numpy()


def direction(module: nn.Module, kind: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, suffix: str) -> Any:
    """Return the outputs [T, H] and last states of one direction of one layer for one sequence."""
    w, r = (weight_on_grid(getattr(module, f"weight_{of}_{suffix}")) for of in ("ih", "hh"))
    outputs = []
    steps = reversed(range(len(x))) if suffix.endswith("reverse") else range(len(x))
    for t in steps:
        of_x, of_h = x[t] @ w.T + bias(module, f"bias_ih_{suffix}"), h @ r.T + bias(module, f"bias_hh_{suffix}")
        h, c = step(kind, of_x, of_h, h, c)
        if module.proj_size:
            h = h @ weight_on_grid(getattr(module, f"weight_hr_{suffix}")).T
        outputs.append((t, h))
    return np.stack([h for _, h in sorted(outputs, key=lambda pair: pair[0])]), h, c


def sequences_of(case: Case, module: nn.Module, x: Any) -> list[tuple[int | None, Tensor]]:
    """Return (place in the batch, [t, IN]) of every sequence."""
    if isinstance(x, PackedSequence):
        padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(x)
        return [(n, padded[:length, n]) for n, length in enumerate(lengths.tolist())]
    if x.dim() == 2:
        return [(None, x)]
    return [(n, x[n] if module.batch_first else x[:, n]) for n in range(N)]


@every_layer
def test_layer_is_the_formula_on_the_grid(case):
    module, (x, *given) = case.calibrated()
    amax = (x.data if isinstance(x, PackedSequence) else x).abs().max()
    output, states = module(x, *given)
    if isinstance(output, PackedSequence):
        output = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=module.batch_first)[0]
    last_h, last_c = states if case.float_class is nn.LSTM else (states, None)
    h_0, c_0 = given[0] if given and case.float_class is nn.LSTM else (*given, None, None)[:2]
    suffixes = ["", "_reverse"][: 2 if module.bidirectional else 1]
    for n, sequence in sequences_of(case, module, x):
        layer = on_grid(sequence, amax, -128)
        for index in range(module.num_layers):
            ends = []
            for place, suffix in enumerate(suffixes):
                at = (index * len(suffixes) + place, *(() if n is None else (n,)))
                h = np.zeros(module.proj_size or H) if h_0 is None else h_0[at].double().numpy()
                c = np.zeros(H) if c_0 is None else c_0[at].double().numpy()
                y, h, c = direction(module, kind_of(case), layer, h, c, f"l{index}{suffix}")
                ends.append(y)
                np.testing.assert_allclose(last_h[at].detach(), h, atol=1e-5)
                if last_c is not None:
                    np.testing.assert_allclose(last_c[at].detach(), c, atol=1e-5)
            layer = np.concatenate(ends, axis=-1)
        found = output if n is None else output[n] if module.batch_first else output[:, n]
        np.testing.assert_allclose(found.detach()[: len(layer)], layer, atol=1e-5)


@every_cell
def test_cell_is_the_formula_on_the_grid(case):
    module, (x, *given) = case.calibrated()
    h, c = given[0] if isinstance(given[0] if given else None, tuple) else (*given, None, None)[:2]
    h, c = (np.zeros((*x.shape[:-1], H)) if state is None else state.double().numpy() for state in (h, c))
    amax = np.float32(np.abs(h).max()) or np.float32(1)
    x, quantized = on_grid(x, x.abs().max(), -128), on_grid(h, amax, -128)
    of_x = x @ weight_on_grid(module.weight_ih).T + bias(module, "bias_ih")
    of_h = quantized @ weight_on_grid(module.weight_hh).T + bias(module, "bias_hh")
    expected = step(kind_of(case), of_x, of_h, h, c)
    for found, state in zip(leaves(module(torch.as_tensor(x, dtype=torch.float32), *given)), expected, strict=False):
        np.testing.assert_allclose(found.detach(), state, atol=1e-5)


def test_a_gru_cell_keeps_what_is_below_half_a_step():
    cell = fq.nn.GRUCell(IN, H)
    nn.init.constant_(cell.bias_ih[H : 2 * H], 50.0)  # the update gate: keep everything
    for quantizer in quantizers(cell):
        quantizer.amax = 1.0
    h = torch.full((N, H), 0.3 / 127)
    torch.testing.assert_close(cell(torch.randn(N, IN), h), h, rtol=0, atol=1e-6)


@every_class
def test_default_grids(case):
    module = case.quantized()
    weights = {q for _, q in module.weight_quantizers()}
    assert {q.descriptor for q in module.input_quantizers()} == {QUANT_DESC_8BIT_PER_TENSOR}
    assert {q.descriptor for q in weights} == {fq.QuantDescriptor(8, axis=0, narrow_range=True)}
    assert len(quantizers(module)) == len(weights) + len(module.input_names)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"weight_ih_l0", "weight_hh_l0"}),
        ({"bias": False, "proj_size": 2}, {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (
            {"num_layers": 2, "bidirectional": True},
            {f"weight_{of}_l{i}{suffix}" for of in ("ih", "hh") for i in (0, 1) for suffix in ("", "_reverse")},
        ),
    ],
)
def test_each_weight_has_a_quantizer_of_its_own(kwargs, expected):
    module = QuantLSTM(IN, H, **kwargs)
    assert set(module.weight_names) == expected
    assert set(module._modules) == {f"_{name}_quantizer" for name in (*expected, "input")}


@every_class
def test_descriptor_arguments(case):
    module = case.quantized(quant_desc_input=fq.QuantDescriptor(4), quant_desc_weight=fq.QuantDescriptor(5))
    assert {q.num_bits for q in module.input_quantizers()} == {4}
    assert {q.num_bits for _, q in module.weight_quantizers()} == {5}


@pytest.mark.parametrize("name", ["quant_desc_input", "quant_desc_weight"])
@every_class
def test_descriptors_of_another_type_are_refused(case, name):
    with pytest.raises(InvalidTypeError, match=rf"{name}: expected a QuantDescriptor, got 8"):
        case.quantized(**{name: 8})


# Training.


@every_case
def test_gradients_reach_every_parameter(case):
    module, args = case.calibrated()
    has_no_state = case.is_cell and not case.has_state
    for (name, _), gradient in zip(module.named_parameters(), gradients(module.train(), module, args), strict=True):
        assert gradient is not None
        assert bool(gradient.any()) or (has_no_state and name == "weight_hh"), name


@every_kind
def test_a_step_of_training_changes_the_quantized_weights(case):
    module, args = case.calibrated()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    before = module(*args)
    gradients(module, module, args)
    optimizer.step()
    assert any(not torch.equal(*pair) for pair in zip(leaves(module(*args)), leaves(before), strict=True))


@every_kind
def test_gradient_checkpointing_gives_the_same_gradients(case):
    module, args = case.calibrated()
    checkpointed = functools.partial(checkpoint, module, use_reentrant=False)
    found = zip(*(gradients(module, function, args) for function in (module, checkpointed)), strict=True)
    assert all(torch.equal(one, other) for one, other in found)


# An ordinary module.


@every_case
def test_float_state_dict_loads_strictly_and_only_ranges_are_new(case):
    float_module, quantized = case.pair()
    state = quantized.state_dict()
    named = ((n, child) for n, child in quantized.named_modules() if isinstance(child, TensorQuantizer))
    ranges = {f"{name}.{key}" for name, child in named for key in child.range_keys}
    assert set(state) == set(float_module.state_dict()) | ranges
    assert all(torch.equal(state[name], value) for name, value in float_module.state_dict().items())


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "copied",
    [
        lambda module, case: copy.deepcopy(module),
        lambda module, case: pickle.loads(pickle.dumps(module)),
        lambda module, case: loaded(case.quantized(), through_a_file(module.state_dict())),
    ],
    ids=["deepcopy", "pickle", "weights_only state_dict"],
)
@every_kind
def test_a_copy_gives_the_same(case, copied):
    module, args = case.calibrated()
    assert_same(copied(module, case)(*args), module(*args))


def loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_case
def test_outputs_have_the_dtype_of_the_model_and_ranges_stay_float32(case, dtype):
    module, args = case.calibrated()
    args = pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, args)
    outputs = module.to(dtype)(*args)
    assert {leaf.dtype for leaf in leaves(outputs) if leaf.is_floating_point()} == {dtype}
    assert {quantizer._amax.dtype for quantizer in quantizers(module)} == {torch.float32}


@every_kind
def test_autocast_gives_torchs_dtypes(case):
    float_module, quantized = case.pair()
    args = case.args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [[leaf.dtype for leaf in leaves(module(*args))] for module in (quantized, float_module)]
    assert found[0] == found[1]


@every_kind
def test_hooks_run_once(case):
    module, calls = case.quantized(), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module(*case.args())
    assert calls == ["before", "after"]


# dynamo breaks the graph at nn.LSTM, GRU and RNN, quantized or not; behind the break it meets tensors with gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "case", [*(case for case in FIRST if case.is_cell or case.float_class is nn.LSTM), DYNAMIC[0]], ids=str
)
def test_compiled_as_far_as_torchs_own(case):
    module, args = case.calibrated()
    compiled = torch.compile(module, fullgraph=case.is_cell, backend="aot_eager")
    for one, other in zip(leaves(compiled(*args)), leaves(module(*args)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@every_kind
def test_replaced_parameters_are_used(case):
    module, args = case.calibrated()
    state = {name: 0 * value for name, value in module.named_parameters()}
    called = torch.func.functional_call(module, state, args)
    zeroed = copy.deepcopy(module)
    zeroed.load_state_dict(state, strict=False)
    assert_same(called, zeroed(*args))


@every_layer
def test_torch_does_not_warn_of_weights(case):
    module, args = case.calibrated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="LSTM with projections")
        module.train()(*args)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (
            fq.nn.GRUCell,
            ((N, IN + 1), (N, H)),
            rf"input: expected shape \(batch, {IN}\) or \({IN},\), got \({N}, {IN + 1}\)",
        ),
        (fq.nn.RNNCell, ((1, N, IN), (N, H)), rf"input: expected shape .*, got \(1, {N}, {IN}\)"),
        (fq.nn.RNNCell, ((N, IN), (1, H)), rf"hx: expected states of shape \({N}, {H}\), got \(1, {H}\)"),
        (fq.nn.LSTMCell, ((N, IN), (N, H), (N, 1)), rf"hx: expected states of shape \({N}, {H}\), got \({N}, 1\)"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(cls, arguments, message):
    x, *states = (torch.randn(shape) for shape in arguments)
    with pytest.raises(InvalidValueError, match=message):
        cls(IN, H)(x, tuple(states) if len(states) == 2 else states[0])


@pytest.mark.parametrize("cls", [fq.nn.LSTMCell, fq.nn.GRUCell, fq.nn.RNNCell])
def test_an_idle_cell_runs_torchs_forward(cls):
    for quantizer in quantizers(cell := cls(IN, H)):
        quantizer.disable()
    with pytest.raises(ValueError, match="Cell: Expected input to be 1D or 2D, got 3D"):
        cell(torch.randn(1, N, IN))


def test_shapes_of_a_layer_are_checked_by_torch():
    with pytest.raises(ValueError, match="LSTM: Expected input to be 2D or 3D, got 4D"):
        QuantLSTM(IN, H)(torch.randn(1, T, N, IN))


# How they get into a model.


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell, self.fc = nn.LSTM(IN, H), nn.GRUCell(H, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cell(self.lstm(x)[0][-1]))


@pytest.mark.parametrize("preset", ["int8", "w4a8"])
def test_presets_leave_layers_float_and_say_why(preset):
    report = fq.quantize(Tagger(), preset)
    assert {layer.name: "R46" in layer.reason for layer in report.layers} == {"lstm": True, "cell": False, "fc": False}


def test_a_rule_quantizes_them():
    report = fq.quantize(model := Tagger(), fq.preset("int8") + fq.Rule(type="LSTM"))
    assert report.left_float == ()
    assert type(model.lstm) is QuantLSTM


def test_initialize_patches_layers_and_cells():
    with fq.patched_torch_nn():
        model = Tagger()
    assert (type(model.lstm), type(model.cell)) == (QuantLSTM, fq.nn.GRUCell)
