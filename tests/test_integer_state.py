import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from torch import nn

import fakequant
from fakequant import IntegerState, QuantDescriptor, Recipe, Rule, integer_state, preset
from fakequant.call_sites import CallSite
from fakequant.errors import CheckpointError, InvalidValueError, ValidationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.fc = nn.Linear(6 * 7 * 7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.up(self.conv(x)).flatten(1))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(recipe: str | Recipe = "int8", model: nn.Module | None = None, x: torch.Tensor = X) -> nn.Module:
    model = model or Net()
    fakequant.quantize(model, recipe)
    fakequant.calibrate(model, [x], progress=False)
    return model.eval()


def values(held: fakequant.IntegerTensor) -> np.ndarray:
    zero = 0 if held.zero_point is None else held.zero_point.numpy().astype(np.float32)
    return (held.codes.numpy().astype(np.float32) - zero) * held.scale.numpy()


def test_weights_are_there_by_name():
    names = [f"{layer}.{parameter}" for layer in ("conv", "up", "fc") for parameter in ("weight", "bias")]
    assert list(integer_state(quantized())) == names


@pytest.mark.parametrize(
    "grid",
    [
        QuantDescriptor(8, axis=0, narrow_range=True),
        QuantDescriptor(4, axis=0),
        QuantDescriptor(16),
        QuantDescriptor(8, affine=True, axis=0),
        QuantDescriptor(8, affine=True, unsigned=True),
        QuantDescriptor(8, dynamic=True),
        QuantDescriptor(8, scale_format="power_of_two"),
        QuantDescriptor(2, scheme="twn", axis=0),
        QuantDescriptor(1, scheme="xnor", axis=0),
        QuantDescriptor(1, scheme="bnn"),
        QuantDescriptor(3, scheme="dorefa"),
        QuantDescriptor(4, learn_amax="lsq", axis=0),
    ],
    ids=str,
)
def test_integers_give_the_fake_quantized_weight_bit_for_bit(grid):
    model = quantized(preset("int8") + Rule("fc", weight=grid))
    held = integer_state(model)["fc.weight"]
    assert not held.codes.is_floating_point()
    np.testing.assert_array_equal(values(held), model.fc.weight_quantizer(model.fc.weight).detach())


@pytest.mark.parametrize(("bits", "dtype"), [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2)], ids=str)
def test_fp8_weights_are_stored_as_fp8(bits, dtype):
    model = quantized(preset("int8") + Rule("fc", weight=QuantDescriptor(bits, axis=0)))
    held = integer_state(model)["fc.weight"]
    assert held.codes.dtype == dtype
    assert torch.equal(held.codes.float() * held.scale, model.fc.weight_quantizer(model.fc.weight))


def test_blocks_have_a_scale_each():
    model = quantized(preset("int8") + Rule("fc", weight=QuantDescriptor(4, block_size=32)))
    assert integer_state(model)["fc.weight"].scale.shape == (5, 10)


def test_fp4_is_named_as_left_out():
    model = quantized(preset("int8") + Rule("fc", weight=QuantDescriptor((2, 1))))
    assert integer_state(model).left_out == {"fc.weight": "FP4 has no dtype in safetensors"}


def test_layers_that_share_a_weight_and_its_quantizer_are_all_there():
    first, last = nn.Linear(32, 32), nn.Linear(32, 32)
    last.weight = first.weight
    model, x = nn.Sequential(first, nn.ReLU(), last), torch.randn(2, 3, 32)
    fakequant.quantize(model, example_inputs=x)
    fakequant.calibrate(model, [x], progress=False)
    assert first.weight_quantizer is last.weight_quantizer
    assert list(integer_state(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_bias_has_the_scale_of_input_times_weight():
    model = quantized()
    held = integer_state(model)["conv.bias"]
    expected = model.conv.input_quantizer.scale * model.conv.weight_quantizer.scale.flatten()
    assert held.codes.dtype == torch.int32
    torch.testing.assert_close(held.scale, expected)
    assert ((held.codes * held.scale - model.conv.bias).abs() <= 0.51 * held.scale).all()


def test_the_bias_of_a_grouped_transposed_convolution_repeats_the_scales_of_a_group():
    model = quantized()
    held = integer_state(model)["up.bias"]
    assert torch.equal(held.scale[:3], held.scale[3:])


@pytest.mark.parametrize(
    "grid",
    [None, QuantDescriptor(8, dynamic=True), QuantDescriptor(8, axis=-1), QuantDescriptor((4, 3))],
    ids=["float", "dynamic", "per channel", "fp8"],
)
def test_a_bias_without_one_known_scale_of_the_input_stays_float_and_is_named(grid):
    state = integer_state(quantized(preset("int8") + Rule("fc", input=grid)))
    assert "fc.weight" in state
    assert "fc.bias" not in state
    assert state.left_out == {"fc.bias": "float: the input has no single fixed scale"}
    assert str(state).endswith("fc.bias      float: the input has no single fixed scale")


def test_a_range_that_a_dynamic_input_does_not_use_gives_the_bias_no_scale():
    model = quantized(preset("int8") + Rule("fc", input=QuantDescriptor(8, dynamic=True)))
    model.fc.input_quantizer.amax = 1.0  # as from the checkpoint of a static model
    assert "fc.bias" in integer_state(model).left_out


@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (nn.Linear(4, 8), QuantDescriptor(8, axis=1)),
        (nn.Linear(4, 8), QuantDescriptor(4, block_size=4, block_axis=0)),
        (nn.Linear(4, 8), QuantDescriptor((4, 3), axis=0)),
        (nn.ConvTranspose2d(4, 8, 2), QuantDescriptor(8, axis=0)),
    ],
    ids=["input channels", "blocks", "fp8", "input channels, transposed"],
)
def test_a_bias_without_a_scale_for_each_of_its_elements_stays_float(layer, grid):
    x = torch.randn(2, 4, 3, 3) if isinstance(layer, nn.ConvTranspose2d) else torch.randn(2, 4)
    model = quantized(Recipe((Rule(weight=grid),)), nn.Sequential(layer), x)
    assert integer_state(model).left_out == {"0.bias": "float: the weight has no integer scale for each output channel"}


@pytest.mark.parametrize("value", [1e9, torch.nan])
def test_a_bias_beyond_int32_stays_float(value):
    model = quantized()
    with torch.no_grad():
        model.conv.bias[0] = value
    assert integer_state(model).left_out == {"conv.bias": "float: beyond int32"}


def test_the_file_of_onnx_holds_the_same_integers(tmp_path):
    model = quantized()
    fakequant.export_onnx(model, (X,), tmp_path / "net.onnx")
    initializers = ir.load(tmp_path / "net.onnx").graph.initializers.values()
    stored = {value.const_value.numpy().tobytes() for value in initializers if value.dtype == ir.DataType.INT8}
    for name in ("conv.weight", "up.weight", "fc.weight"):
        codes = integer_state(model)[name].codes.numpy()
        assert codes.tobytes() in stored or np.ascontiguousarray(codes.T).tobytes() in stored


@pytest.mark.parametrize(
    ("layer", "gates"), [(nn.LSTM, "ifgo"), (nn.GRU, "rzn"), (nn.LSTMCell, "ifgo"), (nn.GRUCell, "rzn")]
)
def test_gates_have_names_of_their_own(layer, gates):
    model = quantized(Recipe((Rule(type=layer.__name__),)), layer(6, 4), torch.randn(3, 6))
    state = integer_state(model)
    first = "weight_ih" if "Cell" in layer.__name__ else "weight_ih_l0"
    assert [name.removeprefix(f"{first}.") for name in state][: len(gates)] == list(gates)
    whole = np.concatenate([values(state[f"{first}.{gate}"]) for gate in gates])
    quantizer = getattr(model, f"_{first}_quantizer")
    np.testing.assert_array_equal(whole, quantizer(getattr(model, first)).detach())


@pytest.mark.parametrize(
    ("layer", "name", "read", "gates"),
    [
        (nn.LSTMCell, "ih", "input", "ifgo"),
        (nn.LSTMCell, "hh", "hidden", "ifgo"),
        (nn.GRUCell, "ih", "input", "rzn"),
        (nn.GRUCell, "hh", "hidden", "rzn"),
        (nn.LSTM, "ih_l0", "input", "ifgo"),
    ],
)
def test_biases_of_gates_have_the_scale_of_what_their_weight_is_multiplied_with(layer, name, read, gates):
    model = quantized(Recipe((Rule(type=layer.__name__),)), layer(6, 4), torch.randn(3, 6))
    getattr(model, f"_{read}_quantizer").amax = 2.54
    state = integer_state(model)
    codes = np.concatenate([state[f"bias_{name}.{gate}"].codes for gate in gates])
    step = 0.02 * getattr(model, f"weight_{name}").detach().abs().amax(1).numpy() / 127
    np.testing.assert_allclose(codes, getattr(model, f"bias_{name}").detach().numpy() / step, atol=0.51)


def test_biases_beside_a_float_state_stay_float():
    model = quantized(Recipe((Rule(type="LSTM"),)), nn.LSTM(6, 4, num_layers=2), torch.randn(3, 6))
    assert list(integer_state(model).left_out) == ["bias_hh_l0", "bias_ih_l1", "bias_hh_l1"]


def test_gates_share_scales_that_do_not_belong_to_rows(tmp_path):
    for grid in (QuantDescriptor(8), QuantDescriptor(8, axis=1), QuantDescriptor(8, affine=True)):
        model = quantized(Recipe((Rule(type="LSTM", weight=grid),)), nn.LSTM(6, 4), torch.randn(3, 6))
        integer_state(model).save(tmp_path / "gates.safetensors")
        state = IntegerState.load(tmp_path / "gates.safetensors")
        whole = np.concatenate([values(state[f"weight_ih_l0.{gate}"]) for gate in "ifgo"])
        np.testing.assert_array_equal(whole, model._weight_ih_l0_quantizer(model.weight_ih_l0).detach())


def test_blocks_that_cross_gates_keep_the_weight_whole():
    grid = QuantDescriptor(8, block_size=3, block_axis=0)
    model = quantized(Recipe((Rule(type="GRU", weight=grid),)), nn.GRU(6, 4), torch.randn(3, 6))
    assert list(integer_state(model)) == ["weight_ih_l0", "weight_hh_l0"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.columns = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0] @ self.columns


TOKENS = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def codes_of_rows(weight: torch.Tensor) -> np.ndarray:
    array = weight.detach().numpy()
    return np.rint(array / (np.abs(array).max(1, keepdims=True) / np.float32(127))).astype(np.int8)


def test_biases_of_attention_are_those_of_its_projections():
    model = quantized("int8", Attention(), TOKENS).attention
    nn.init.normal_(model.in_proj_bias)
    state = integer_state(model)
    for index, name in enumerate(("query", "key", "value")):
        rows = slice(32 * index, 32 * index + 32)
        step = TOKENS.abs().max() / 127 * model.in_proj_weight[rows].abs().amax(1) / 127
        expected = (model.in_proj_bias[rows] / step).detach()
        np.testing.assert_allclose(state[f"{name}_bias"].codes, expected, atol=0.51)


def placed(model: nn.Module | None = None) -> nn.Module:
    model = model or Attention()
    fakequant.quantize(model, example_inputs=TOKENS)
    fakequant.calibrate(model, [TOKENS], progress=False)
    return model


def test_weights_of_functional_calls_are_seen_in_an_example():
    model = placed()
    nn.init.normal_(model.attention.in_proj_bias)
    state = integer_state(model, TOKENS)
    assert state.left_out == {}
    held, bias = state["attention.linear_0.weight"], state["attention.linear_0.bias"]
    np.testing.assert_array_equal(held.codes, codes_of_rows(model.attention.in_proj_weight))
    np.testing.assert_array_equal(state["matmul_0.other"].codes, codes_of_rows(model.columns.T).T)
    step = TOKENS.abs().max() / 127 * held.scale.flatten()
    np.testing.assert_allclose(bias.codes, (model.attention.in_proj_bias / step).detach(), atol=0.51)


def test_an_example_leaves_the_model_as_it_was():
    model = placed(nn.Sequential(nn.BatchNorm1d(5), Attention())).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    integer_state(model, TOKENS)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, CallSite))


def test_weights_of_functional_calls_are_named_without_an_example():
    state = integer_state(placed())
    assert list(state) == ["attention.out_proj.weight", "attention.out_proj.bias"]
    assert list(state.left_out) == ["matmul_0.other", "attention.linear_0.weight"]
    assert set(state.left_out.values()) == {"read by a functional call: pass example_inputs that make it"}


def test_saved_integers_come_back(tmp_path):
    state = integer_state(quantized(preset("int8") + Rule("fc", weight=QuantDescriptor(8, affine=True))))
    state.save(tmp_path / "integers.safetensors")
    loaded = IntegerState.load(tmp_path / "integers.safetensors")
    assert set(loaded) == set(state)
    for name in state:
        for part, back in zip(state[name], loaded[name], strict=True):
            assert (part is back is None) or (part.dtype == back.dtype and torch.equal(part, back))


def test_the_file_is_plain_safetensors(tmp_path):
    integer_state(quantized()).save(tmp_path / "integers.safetensors")
    with safe_open(tmp_path / "integers.safetensors", "pt") as file:
        assert file.get_tensor("conv.weight").dtype == torch.int8


def test_a_parameter_may_be_called_scale(tmp_path):
    state = IntegerState(
        {"norm.scale": fakequant.IntegerTensor(torch.ones(2, dtype=torch.int8), torch.ones(()), None)}, {}
    )
    state.save(tmp_path / "integers.safetensors")
    assert list(IntegerState.load(tmp_path / "integers.safetensors")) == ["norm.scale"]


def test_a_file_without_scales_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="expected a scale for each tensor, got none for conv.weight"):
        IntegerState.load(tmp_path / "bad.safetensors")


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="expected a safetensors file of integers"):
        IntegerState.load(tmp_path / "bad.safetensors")


def test_an_uncalibrated_weight_is_named():
    model = Net()
    fakequant.quantize(model)
    with pytest.raises(InvalidValueError, match="conv.weight: expected a calibrated quantizer"):
        integer_state(model)


def test_a_model_without_quantized_weights_is_refused():
    with pytest.raises(InvalidValueError, match="expected at least one layer with a quantized weight, got none"):
        integer_state(Net())


def test_codes_that_do_not_give_the_weight_back_are_an_error(monkeypatch):
    model = quantized()
    quantizer = model.fc.weight_quantizer
    codes_of = quantizer.codes_of
    monkeypatch.setattr(quantizer, "codes_of", lambda weight: codes_of(weight)._replace(scale=2 * quantizer.scale))
    with pytest.raises(ValidationError, match="fc.weight: expected codes that give the fake-quantized values"):
        integer_state(model)


def test_str_has_a_line_for_each_parameter():
    assert str(integer_state(quantized())).splitlines()[0] == "conv.weight  int8 (4, 3, 3, 3), 4 scales"
