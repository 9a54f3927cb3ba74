import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fakequant
from fakequant.convert import dequantize, quantize
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError, RecipeError
from fakequant.nn import QuantConv2d, QuantInputMixin, QuantLinear, TensorQuantizer
from fakequant.nn.modules.quant_module import QuantizedInputForward
from fakequant.nn.modules.recurrent import UINT8_OF_CALL
from fakequant.presets import preset
from fakequant.recipe import Grid, Recipe, Rule


class Net(nn.Module):
    """A convolution, a norm, a pool and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv(x)).relu())
        return self.fc(self.up(x).mean((2, 3)))


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 10 * super().forward(input)


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def switch_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()


def reasons(report: fakequant.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.left_float}


# What becomes quantized.


def test_default_recipe_quantizes_every_convolution_and_linear_layer():
    model = Net()
    quantize(model)
    assert {name for name, m in model.named_modules() if isinstance(m, QuantInputMixin)} == {"conv", "up", "fc"}


def test_single_layer_is_quantized():
    layer = nn.Linear(2, 2)
    quantize(layer)
    assert type(layer) is QuantLinear


@pytest.mark.parametrize("recipe", ["w4a8", preset("w4a8")], ids=["name", "recipe"])
def test_recipe_by_name_or_as_an_object(recipe):
    model = Net()
    quantize(model, recipe)
    assert model.fc.weight_quantizer.num_bits == 4


def test_rule_by_name():
    model = Net()
    quantize(model, preset("int8") + Rule("f?", input=None, weight=None))
    assert (type(model.fc), type(model.conv)) == (nn.Linear, QuantConv2d)


def test_rule_by_type():
    model = Net()
    quantize(model, preset("int8") + Rule(type="Conv*", input=None, weight=None))
    assert (type(model.fc), type(model.conv), type(model.up)) == (QuantLinear, nn.Conv2d, nn.ConvTranspose2d)


def test_last_rule_wins():
    model = Net()
    quantize(model, preset("int8") + Rule(input=None, weight=None) + Rule("fc"))
    assert (type(model.fc), type(model.conv)) == (QuantLinear, nn.Conv2d)


def test_rule_reaches_a_class_that_the_preset_leaves_alone():
    model = Net()
    quantize(model, preset("int8") + Rule(type="MaxPool2d"))
    assert type(model.pool) is fakequant.nn.QuantMaxPool2d


def test_rule_sets_the_grids():
    model, grids = Net(), (QuantDescriptor(6), QuantDescriptor(5, axis=0))
    quantize(model, preset("int8") + Rule("fc", input=grids[0], weight=grids[1]))
    assert (model.fc.input_quantizer.descriptor, model.fc.weight_quantizer.descriptor) == grids


def test_default_grid_is_the_class_default_at_conversion(monkeypatch):
    monkeypatch.setattr(QuantLinear, "default_quant_desc_weight", QuantDescriptor(3))
    model = Net()
    quantize(model)
    assert model.fc.weight_quantizer.num_bits == 3


def test_weight_only_rule_leaves_the_input_float():
    model = nn.Sequential(nn.Linear(3, 2))
    quantize(model, preset("int8") + Rule(input=None))
    x = torch.randn(4, 3)
    weight = model[0].weight_quantizer(model[0].weight)
    assert torch.equal(model(x), nn.functional.linear(x, weight, model[0].bias))


def test_input_only_rule_leaves_the_weight_float():
    model = nn.Sequential(nn.Linear(3, 2))
    quantize(model, preset("int8") + Rule(weight=None))
    x = torch.randn(4, 3)
    expected = nn.functional.linear(model[0].input_quantizer(x), model[0].weight, model[0].bias)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("rule", "grids"),
    [(Rule(input=None), (None, True)), (Rule(weight=None), (True, None)), (Rule(), (True, True))],
    ids=["weight only", "input only", "both"],
)
def test_report_has_the_grids_that_are_in_use(rule, grids):
    (layer,) = quantize(nn.Sequential(nn.Linear(3, 2)), preset("int8") + rule).layers
    assert (layer.input is not None or None, layer.weight is not None or None) == grids


def test_quantizers_are_where_the_model_is():
    with torch.device("meta"):
        model = Net()
    quantize(model, preset("int8") + Rule(type="MaxPool2d"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


# Errors leave the model as it was.


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (preset("int8") + Rule("fx"), RecipeError, "rule name='fx'"),
        (preset("int8") + Rule("norm"), RecipeError, "rule name='norm'"),
        ("int9", RecipeError, "got 'int9'"),
        (preset("int8") + Rule("fc", weight=QuantDescriptor(fake_quant=False)), InvalidValueError, "fake_quant=True"),
        (preset("int8") + Rule("up", input=QuantDescriptor(calib_method="x")), InvalidValueError, "calib_method"),
        (8, InvalidTypeError, "recipe: expected a preset's name or a Recipe, got 8"),
        (Rule("fc"), InvalidTypeError, "recipe: expected a preset's name or a Recipe"),
    ],
    ids=["no such layer", "no such type", "preset", "real quantization", "calibrator", "int", "rule"],
)
def test_wrong_recipe_leaves_the_model_unchanged(recipe, error, message):
    model = Net()
    before, keys = types(model), list(model.state_dict())
    with pytest.raises(error, match=message):
        quantize(model, recipe)
    assert (types(model), list(model.state_dict())) == (before, keys)


def test_failed_second_conversion_leaves_the_first():
    model = Net()
    quantize(model, preset("int8") + Rule("fc", input=None, weight=None))
    with pytest.raises(InvalidValueError):
        quantize(model, preset("int8") + Rule("fc", weight=QuantDescriptor(fake_quant=False)))
    assert (type(model.conv), type(model.fc)) == (QuantConv2d, nn.Linear)


@pytest.mark.parametrize("model", ["resnet", None, nn.Linear, [nn.Linear(2, 2)]], ids=["str", "None", "class", "list"])
def test_model_of_another_type_is_refused(model):
    with pytest.raises(InvalidTypeError, match="model: expected an nn.Module, got"):
        quantize(model)


# The report.


def test_report_text():
    report = quantize(Net(), preset("int8") + Rule("fc", input=None, weight=None, reason="sensitive"))
    assert str(report).splitlines() == [
        "1 of 1 Conv2d quantized",
        "1 of 1 ConvTranspose2d quantized",
        "0 of 1 Linear quantized",
        "  float: fc (Linear): sensitive",
    ]


def test_report_of_a_root_layer():
    report = quantize(nn.Linear(2, 2), Recipe())
    assert str(report).splitlines()[-1] == "  float: (root) (Linear): no rule of the recipe matches it"


def test_report_of_a_model_without_layers():
    assert str(quantize(nn.ReLU())) == "no convolution or linear layer in the model"


def test_report_counts():
    report = quantize(Net(), preset("int8") + Rule("fc", input=None, weight=None))
    assert ([layer.name for layer in report.quantized], [layer.name for layer in report.left_float]) == (
        ["conv", "up"],
        ["fc"],
    )


def test_report_has_the_types_before_conversion():
    assert [layer.type for layer in quantize(Net()).layers] == ["Conv2d", "ConvTranspose2d", "Linear"]


def test_reason_of_a_rule():
    report = quantize(Net(), preset("int8") + Rule("fc", input=None, weight=None))
    assert reasons(report) == {"fc": "rule 'fc', type '*' leaves it float"}


def test_reason_of_a_subclass_with_its_own_forward():
    model = nn.Sequential(OwnForward(2, 2))
    report = quantize(model)
    assert type(model[0]) is OwnForward
    assert reasons(report)["0"].startswith("OwnForward is a subclass of Linear and may have its own forward")


def test_reason_of_a_projection_in_float_attention():
    report = quantize(
        nn.TransformerDecoderLayer(8, 2, 16), preset("int8") + Rule(type="Multi*", input=None, weight=None, reason="so")
    )
    expected = "nn.MultiheadAttention reads its weight; its forward never runs"
    names = ("self_attn", "multihead_attn")
    assert reasons(report) == dict.fromkeys(names, "so") | {f"{name}.out_proj": expected for name in names}


def test_reason_of_a_parametrized_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    assert "remove the parametrization first" in reasons(quantize(model))["0"]


def test_reason_of_disabled_quantizers():
    model = Net()
    quantize(model)
    model.fc.input_quantizer.disable()
    model.fc.weight_quantizer.disable()
    assert reasons(quantize(model)) == {"fc": "its quantizers are disabled"}


# An ordinary module.


def test_quantizers_off_is_bit_identical_to_float():
    model, x = Net().eval(), image()
    expected = model(x)
    quantize(model)
    switch_off(model)
    assert torch.equal(model(x), expected)


def test_quantized_output_is_near_float_but_not_equal():
    model, x = Net().eval(), image()
    expected = model(x)
    quantize(model)
    error = (model(x) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


def test_conversion_keeps_modules_and_parameters():
    model = Net()
    modules, parameters = list(model.children()), dict(model.named_parameters())
    quantize(model)
    assert all(a is b for a, b in zip(modules, model.children(), strict=True))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_optimizer_made_before_goes_on_training():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize(model)
    before = model.conv.weight.detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.conv.weight)


def test_hooks_survive():
    model, calls = Net(), []
    model.fc.register_forward_hook(lambda *_: calls.append("fc"))
    quantize(model)
    model(image())
    assert calls == ["fc"]


def test_mode_survives():
    model = Net()
    model.conv.eval()
    quantize(model)
    assert (model.conv.training, model.fc.training) == (False, True)


def test_module_under_two_names_stays_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    quantize(model)
    assert model[0] is model[2]
    assert type(model[0]) is QuantLinear


def test_module_under_two_names_is_reported_once():
    model = nn.Sequential(nn.Linear(3, 3))
    model.append(model[0])
    assert [layer.name for layer in quantize(model).layers] == ["0"]


def test_shared_parameter_stays_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    quantize(model)
    assert model[0].weight is model[1].weight


def test_embedding_tied_to_a_quantized_layer_stays_float():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    before = model["embedding"](torch.arange(7))
    quantize(model)
    assert torch.equal(model["embedding"](torch.arange(7)), before)


def test_quantizing_twice_changes_nothing():
    model = Net()
    quantize(model)
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    quantize(model)
    again = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    assert all(a is b for a, b in zip(quantizers, again, strict=True))


@pytest.mark.parametrize(
    "recipe", [preset("int8"), preset("int8") + Rule("fc", weight=QuantDescriptor(4))], ids=["preset", "rule"]
)
def test_second_report_is_the_first(recipe):
    model = Net()
    assert quantize(model, recipe) == quantize(model, recipe)


def test_copy_of_a_quantized_model_is_independent():
    model = Net()
    quantize(model)
    other = copy.deepcopy(model)
    other.fc.input_quantizer.disable()
    assert model.fc.input_quantizer.is_enabled


# Back to float.


def test_dequantize_restores_types_and_keys():
    model = Net()
    before, keys = types(model), list(model.state_dict())
    quantize(model, preset("int8") + Rule(type="MaxPool2d"))
    dequantize(model)
    assert (types(model), list(model.state_dict())) == (before, keys)


def test_dequantize_restores_the_output():
    model, x = Net().eval(), image()
    expected = model(x)
    quantize(model)
    fakequant.calibrate(model, [x], progress=False)
    assert torch.equal(dequantize(model)(x), expected)


def test_dequantize_returns_the_model():
    model = Net()
    assert dequantize(model) is model


def test_dequantize_keeps_trained_weights():
    model = Net()
    quantize(model)
    with torch.no_grad():
        model.fc.weight.fill_(0.3)
    assert torch.equal(dequantize(model).fc.weight, torch.full((5, 4), 0.3))


def test_dequantized_model_can_be_quantized_again():
    model = Net()
    quantize(model)
    quantize(dequantize(model), "w4a8")
    assert model.fc.weight_quantizer.num_bits == 4


def test_dequantize_leaves_an_unregistered_class_alone():
    class Mine(QuantizedInputForward, nn.ReLU):
        """Quantized by hand."""

    model = nn.Sequential(Mine(), QuantLinear(2, 2))
    assert types(dequantize(model))[1:2] == [Mine]
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.LSTMCell])
@pytest.mark.parametrize("grid", [Grid.DEFAULT, UINT8_OF_CALL], ids=["default", "of the call"])
def test_dequantize_leaves_no_quantizer_in_a_recurrent_layer(layer, grid):
    model = nn.Sequential(layer(3, 3))
    quantize(model, preset("int8") + Rule("0", input=grid))
    dequantize(model)
    assert list(model[0].children()) == []


def test_default_grid_marker_is_not_stored():
    model = nn.Sequential(nn.Linear(2, 2))
    quantize(model, Recipe(rules=(Rule(input=Grid.DEFAULT, weight=Grid.DEFAULT),)))
    assert isinstance(model[0].input_quantizer.descriptor, QuantDescriptor)


# torch's transformer encoder has a fused kernel that would pass the quantizers by.


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
def test_encoder_is_quantized_without_gradient_too(padding):
    model, x = encoder(), torch.randn(2, 5, 8)
    quantize(model)
    with_gradient = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        without = model(x, src_key_padding_mask=padding)
    # The float attention is fused without gradient (1e-7); passing the quantizers by is an error of 1e-2.
    torch.testing.assert_close(without, with_gradient, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
def test_encoder_with_quantizers_off_is_bit_identical_to_float(padding):
    model, x = encoder(), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        quantize(model)
        switch_off(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


def test_encoder_is_calibrated_with_padding():
    model = encoder()
    quantize(model)
    batch = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": PADDING}
    assert len(fakequant.calibrate(model, [batch], progress=False).ranges) == 2 * (7 + 3 + 2 + 4)


def test_encoder_copies_keep_their_quantizers_at_work():
    model, x = encoder(), torch.randn(2, 5, 8)
    quantize(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_encoder_is_restored():
    model = encoder()
    before = types(model)
    quantize(model)
    assert types(dequantize(model)) == before


def test_encoder_that_stays_float_keeps_its_type():
    model = encoder()
    before = types(model)
    quantize(model, preset("int8") + Rule(input=None, weight=None))
    assert types(model) == before


def test_encoder_compiles_without_graph_break():
    model, x = encoder().layers[0], torch.randn(2, 5, 8)
    quantize(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
