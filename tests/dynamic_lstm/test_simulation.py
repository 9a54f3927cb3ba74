"""A QuantLSTM on a dynamic uint8 grid computes what DynamicQuantizeLSTM does. It is in the battery of tests/nn too."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fakequant as fq
from fakequant.errors import InvalidValueError
from fakequant.nn import QuantGRU, QuantLSTM, TensorQuantizer
from fakequant.nn.modules.recurrent import UINT8_OF_CALL

IN, H, T, N = 6, 9, 5, 3
DEEP = {"num_layers": 2, "bidirectional": True}


def lstm(**kwargs: Any) -> QuantLSTM:
    weight = fq.QuantDescriptor(8, axis=0, narrow_range=True, dynamic=True)
    return QuantLSTM(IN, H, quant_desc_input=UINT8_OF_CALL, quant_desc_weight=weight, **kwargs).eval()


def states(module: nn.LSTM, batch: int = N) -> tuple[Tensor, Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(count, batch, H), torch.randn(count, batch, H)


def arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().numpy() for tensor in tensors)


def assert_close(found: tuple[Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(arrays(*found), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("has_states", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, DEEP, {**DEEP, "batch_first": True}], ids=str)
def test_layers_are_the_operator(kwargs, has_states, operators):
    module, x = lstm(**kwargs), torch.randn(T, N, IN) + 0.3
    given = states(module) if has_states else None
    first = module.batch_first
    y, last = module(x.transpose(0, 1) if first else x, given)
    expected = operators(module, x.numpy(), given and arrays(*given))
    assert_close((y.transpose(0, 1) if first else y, *last), expected)


def test_a_sequence_alone(operators):
    module, x = lstm(**DEEP), torch.randn(T, IN)
    given = states(module, 1)
    y, last = module(x, tuple(state[:, 0] for state in given))
    expected = operators(module, x.numpy()[:, None], arrays(*given))
    assert_close((y, *last), tuple(array[:, 0] for array in expected))


@pytest.mark.parametrize(
    ("kwargs", "lengths"),
    [({}, [5, 3, 2]), (DEEP, [2, 5, 3]), (DEEP, [4, 2, 4])],
    ids=["sorted", "unsorted", "shorter than padded"],
)
def test_packed_sequences_are_padded_ones_with_zeros_behind(kwargs, lengths, operators):
    module, x = lstm(**kwargs), torch.randn(T, N, IN) + 0.3
    given = states(module)
    output, last = module(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), given)
    padded = x.numpy() * (np.arange(T)[:, None] < np.array(lengths))[..., None]
    expected = operators(module, padded, arrays(*given), lengths)
    assert_close((pad_packed_sequence(output)[0], *last), expected)


def test_order_of_a_packed_sequence_is_kept():
    module, x = lstm(), torch.randn(T, N, IN)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    output, _ = module(packed)
    assert output.unsorted_indices is packed.unsorted_indices
    assert output.batch_sizes is packed.batch_sizes


def test_ranges_are_of_each_call():
    module, x = lstm(), torch.randn(T, 1, IN)
    alone, _ = module(x)
    beside, _ = module(torch.cat([x, 100 * torch.randn(T, 1, IN)], dim=1))
    assert not torch.allclose(alone[:, 0], beside[:, 0], atol=1e-3), "one range for all sequences"
    torch.testing.assert_close(module(x)[0], alone, rtol=0, atol=0)


def test_without_the_hidden_quantizer_it_is_the_static_layer():
    module, x = lstm(), torch.randn(T, N, IN)
    expected = nn.LSTM(IN, H)
    expected.load_state_dict({name: p for name, p in module.state_dict().items() if "quantizer" not in name})
    with torch.no_grad():
        for name, quantizer in module.weight_quantizers():
            getattr(expected, name).copy_(quantizer(getattr(module, name)))
    module.hidden_quantizer.disable()
    torch.testing.assert_close(module(x)[0], expected(module.input_quantizer(x))[0], rtol=0, atol=1e-6)


def test_dropout_is_between_layers_and_in_training_only():
    module, x = lstm(num_layers=2, dropout=0.5), torch.randn(T, N, IN)
    once, again = module(x)[0], module(x)[0]
    assert torch.equal(once, again)
    module.train()
    assert not torch.allclose(module(x)[0], once)
    zeroed = copy.deepcopy(module)
    module.dropout = zeroed.dropout = 1.0  # the second layer sees zeros
    torch.nn.init.zeros_(zeroed.weight_ih_l1)
    torch.testing.assert_close(module(x)[0], zeroed(x)[0], rtol=0, atol=0)


def test_gradients_are_straight_through():
    module, x = lstm(), torch.randn(T, N, IN)
    exact = nn.LSTM(IN, H)
    exact.load_state_dict({name: p for name, p in module.state_dict().items() if "quantizer" not in name})
    for one in (module, exact):
        one(x)[0].square().sum().backward()
    for (name, found), other in zip(module.named_parameters(), exact.parameters(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(found.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.999, name


# Which layers have the quantizer.


def test_static_layers_have_none():
    assert QuantLSTM(IN, H).hidden_quantizer is None
    assert QuantLSTM(IN, H, quant_desc_input=fq.QuantDescriptor(8, dynamic=True)).hidden_quantizer is None
    assert len(list(QuantGRU(IN, H, quant_desc_input=UINT8_OF_CALL).children())) == 3


def test_the_calibrator_does_not_matter():
    grid = UINT8_OF_CALL.replace(calib_method="histogram", name="x")
    assert QuantLSTM(IN, H, quant_desc_input=grid).hidden_quantizer is not None


class Tagger(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.lstm, self.gru, self.fc = nn.LSTM(IN, H, **kwargs), nn.GRU(H, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.lstm(x)[0])[0])


X = torch.randn(T, N, IN, generator=torch.Generator().manual_seed(0))
EXAMPLES = pytest.mark.parametrize("example", [None, X], ids=["without example", "with example"])


@EXAMPLES
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    "recipe",
    ["dynamic-lstm", fq.preset("dynamic") + fq.Rule(type="LSTM", input=UINT8_OF_CALL)],
    ids=["preset", "rule"],
)
def test_who_asks_gets_it(recipe, target, example):
    model = Tagger()
    report = fq.quantize(model, recipe, example_inputs=example, target=target)
    assert {layer.name: layer.is_quantized for layer in report.layers} == {"lstm": True, "gru": False, "fc": True}
    assert type(model.lstm) is QuantLSTM
    assert {model.lstm.input_quantizer.descriptor, model.lstm.hidden_quantizer.descriptor} == {UINT8_OF_CALL}
    assert model.lstm.hidden_quantizer.is_enabled
    assert type(model.gru) is nn.GRU


@EXAMPLES
@pytest.mark.parametrize("preset", ["dynamic", "dynamic-per-token", "int8"])
def test_other_presets_leave_it_float(preset, example):
    fq.quantize(model := Tagger(), preset, example_inputs=example)
    assert type(model.lstm) is nn.LSTM


def test_both_ways_to_quantize_give_the_same():
    model = Tagger().eval()
    placed = copy.deepcopy(model)
    fq.quantize(model, "dynamic-lstm")
    fq.quantize(placed, "dynamic-lstm", example_inputs=X, target="onnxruntime")
    assert torch.equal(model(X), placed(X))


@EXAMPLES
def test_dequantize_gives_the_float_layer_back(example):
    model = Tagger().eval()
    before = model(X)
    fq.quantize(model, "dynamic-lstm", example_inputs=example)
    assert not torch.equal(model(X), before)
    fq.dequantize(model)
    assert torch.equal(model(X), before)
    assert not [module for module in model.modules() if isinstance(module, TensorQuantizer)]


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(IN, IN, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.lstm(x)[0])[0]

    model = Twice().eval()
    fq.quantize(model, "dynamic-lstm", example_inputs=X, target="onnxruntime")
    once = copy.deepcopy(model.lstm)
    once._modules["_input_quantizer"] = TensorQuantizer(UINT8_OF_CALL)
    assert torch.equal(model(X), once(once(X)[0])[0])


def test_a_target_without_it_is_left_alone():
    model = Tagger().eval()
    recipe = fq.preset("dynamic") + fq.Rule(type="LSTM", input=UINT8_OF_CALL, target="onnxruntime")
    fq.quantize(model, recipe, example_inputs=X, target="onnxruntime")
    assert model.lstm.hidden_quantizer.is_enabled
    fq.retarget(model, "tensorrt")
    assert type(model.lstm) is nn.LSTM
    assert not model.lstm._modules["_hidden_quantizer"].is_enabled


# What is refused.


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@EXAMPLES
def test_a_projection_is_refused_and_the_model_left_float(example):
    model = nn.Sequential(nn.LSTM(IN, H, proj_size=2))
    with pytest.raises(InvalidValueError, match=r"proj_size: expected 0 .* got 2\. ONNX Runtime's"):
        fq.quantize(model, "dynamic-lstm", example_inputs=example)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        ((T, N, IN + 1), None, f"Expected {IN}, got {IN + 1}"),
        ((1, T, N, IN), None, "input must have 3 dimensions, got 4"),
        ((T, N, IN), ((1, 1, H), (1, N, H)), r"Expected hidden\[0\] size \(1, 3, 9\), got \[1, 1, 9\]"),
        ((T, N, IN), ((1, N, H), (1, N, 1)), r"Expected hidden\[1\] size \(1, 3, 9\), got \[1, 3, 1\]"),
    ],
)
def test_shapes_are_checked_by_torch(x, hx, message):
    given = None if hx is None else tuple(torch.randn(shape) for shape in hx)
    with pytest.raises((RuntimeError, ValueError), match=message):
        lstm()(torch.randn(x), given)
