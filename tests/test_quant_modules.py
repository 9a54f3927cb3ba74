import functools
import types

import pytest
import torch
from torch import Tensor, nn

import fakequant
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn import QuantConv2d, QuantLinear, QuantMaxPool2d, TensorQuantizer
from fakequant.quant_modules import deactivate, enable_onnx_export, initialize, patched_torch_nn

PATCHED = [
    *(f"{kind}{d}d" for kind in ("Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool") for d in (1, 2, 3)),
    "Linear",
    "MultiheadAttention",
    *(f"{kind}{suffix}" for kind in ("LSTM", "GRU", "RNN") for suffix in ("", "Cell")),
]
NOT_PATCHED = [
    *(f"{kind}{d}d" for kind in ("MaxPool", "InstanceNorm", "BatchNorm") for d in (1, 2, 3)),
    *("Embedding", "EmbeddingBag", "Bilinear", "LayerNorm", "ReLU", "Softmax"),
]


@pytest.fixture(autouse=True)
def _torch_nn_is_left_as_it_was():
    """Every test here must undo what it did, and every attribute of torch.nn is looked at."""
    before = dict(vars(nn))
    yield
    leaked = [name for name in before | vars(nn) if vars(nn).get(name) is not before.get(name)]
    deactivate()
    assert leaked == []


@pytest.fixture
def initialized():
    """Return initialize; deactivates afterwards."""
    yield initialize
    deactivate()


class Net(nn.Module):
    """Written as torchvision's models are: the layers are looked up in torch.nn when a model is built."""

    def __init__(self) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())
        self.branch = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.pool(self.up(x + self.branch(x))).flatten(1))


@pytest.mark.parametrize("name", PATCHED)
def test_initialize_patches(name, initialized):
    initialized()
    assert getattr(nn, name) is getattr(fakequant.nn, f"Quant{name}")


@pytest.mark.parametrize("name", NOT_PATCHED)
def test_initialize_leaves_alone(name, initialized):
    before = getattr(nn, name)
    initialized()
    assert getattr(nn, name) is before


def test_initialize_patches_nothing_else(initialized):
    before = dict(vars(nn))
    initialized()
    assert {name for name, value in vars(nn).items() if value is not before[name]} == set(PATCHED)


def test_deactivate_puts_everything_back():
    before = dict(vars(nn))
    initialize()
    deactivate()
    assert vars(nn) == before


def test_deactivate_without_initialize_is_harmless():
    before = dict(vars(nn))
    deactivate()
    assert vars(nn) == before


def test_deactivate_after_two_initializes_puts_everything_back():
    before = dict(vars(nn))
    initialize()
    initialize(["Linear"])
    deactivate()
    assert vars(nn) == before


@pytest.mark.parametrize("first", [None, ["Conv2d"], ["Linear"]], ids=["all", "Conv2d", "Linear"])
def test_float_module_list_of_the_last_call_counts(first, initialized):
    linear = nn.Linear
    initialized(first)
    initialized(["Linear"])
    assert nn.Linear is linear
    assert nn.Conv2d is QuantConv2d


def test_float_module_list_does_not_outlive_deactivate(initialized):
    initialized(["Linear"])
    deactivate()
    initialized()
    assert nn.Linear is QuantLinear


def test_float_module_list_may_name_what_is_never_patched(initialized):
    initialized(["MaxPool2d"])
    assert nn.Conv2d is QuantConv2d


def test_unknown_name_in_float_module_list_is_an_error():
    with pytest.raises(InvalidValueError, match=r"float_module_list: expected names among .*'ReLU'.*got \['Lineer'\]"):
        initialize(["Linear", "Lineer"])


def test_custom_quant_modules_are_patched_and_undone():
    before = nn.MaxPool2d
    initialize(custom_quant_modules=[(nn, "MaxPool2d", QuantMaxPool2d)])
    patched = nn.MaxPool2d
    deactivate()
    assert (patched, nn.MaxPool2d) == (QuantMaxPool2d, before)


def test_custom_quant_modules_win_over_float_module_list(initialized):
    class Mine(QuantLinear):
        pass

    initialized(["Linear"], [(nn, "Linear", Mine)])
    assert nn.Linear is Mine


def test_custom_quant_modules_reach_a_users_module(initialized):
    users = types.ModuleType("users")
    users.Dense = original = nn.Linear
    initialized(custom_quant_modules=[(users, "Dense", QuantLinear)])
    patched = users.Dense
    deactivate()
    assert (patched, users.Dense) == (QuantLinear, original)


@pytest.mark.parametrize(
    ("custom", "error", "message"),
    [
        ([(nn, "Nonsense", QuantLinear)], InvalidValueError, "expected an attribute 'Nonsense'"),
        ([(nn, "Linear")], InvalidTypeError, r"expected \(object, name, class\) triples"),
        ([(nn, 3, QuantLinear)], InvalidTypeError, r"expected \(object, name, class\) triples"),
        ({"Linear": QuantLinear}, InvalidTypeError, r"expected .* triples, got 'Linear'"),
    ],
    ids=["no such attribute", "pair", "name is no str", "dict"],
)
def test_wrong_custom_quant_modules(custom, error, message):
    with pytest.raises(error, match=f"custom_quant_modules: {message}"):
        initialize(custom_quant_modules=custom)


def test_wrong_arguments_leave_the_former_patch_in_place(initialized):
    initialized(["Linear"])
    before = dict(vars(nn))
    with pytest.raises(InvalidValueError):
        initialized(["Lineer"])
    assert vars(nn) == before


def test_object_that_cannot_be_patched_leaves_nothing_patched():
    before = dict(vars(nn))
    with pytest.raises(TypeError):
        initialize(custom_quant_modules=[(int, "real", QuantLinear)])
    assert vars(nn) == before


def test_with_block_patches_and_undoes():
    before = dict(vars(nn))
    with patched_torch_nn():
        inside = nn.Linear
    assert inside is QuantLinear
    assert vars(nn) == before


def test_with_block_undoes_after_an_exception():
    before = dict(vars(nn))
    with pytest.raises(KeyError), patched_torch_nn():
        raise KeyError
    assert vars(nn) == before


def test_nested_with_blocks_restore_step_by_step():
    linear = nn.Linear
    with patched_torch_nn(["Linear"]):
        with patched_torch_nn():
            innermost = nn.Linear
        outer, conv = nn.Linear, nn.Conv2d
    assert (innermost, outer, conv) == (QuantLinear, linear, QuantConv2d)


def test_with_block_inside_initialize_keeps_the_outer_patch(initialized):
    initialized(["Linear"])
    before = dict(vars(nn))
    with patched_torch_nn(["Conv2d"]):
        pass
    assert vars(nn) == before


@pytest.mark.parametrize("call", [initialize, deactivate], ids=["initialize", "deactivate"])
def test_call_inside_a_with_block_is_undone_at_its_end(call):
    before = dict(vars(nn))
    with patched_torch_nn(["Conv2d"]):
        call()
    assert vars(nn) == before


def test_with_block_with_wrong_arguments_keeps_the_outer_patch(initialized):
    initialized()
    before = dict(vars(nn))
    with pytest.raises(TypeError), patched_torch_nn(custom_quant_modules=[(int, "real", QuantLinear)]):
        pass
    assert vars(nn) == before


def test_outer_patch_is_still_undone_after_a_nested_block():
    before = dict(vars(nn))
    initialize()
    with patched_torch_nn():
        pass
    deactivate()
    assert vars(nn) == before


def test_model_built_under_the_patch_is_quantized():
    with patched_torch_nn():
        model = Net()
    quantized = {name for name, module in model.named_modules() if isinstance(module, fakequant.nn.QuantInputMixin)}
    assert quantized == {"stem.0", "branch", "up", "pool", "head"}


def test_model_built_before_is_not_quantized():
    model = Net()
    with patched_torch_nn():
        assert not any(isinstance(module, TensorQuantizer) for module in model.modules())


def test_model_built_under_the_patch_loads_a_float_state_dict_strictly():
    float_model = Net()
    with patched_torch_nn():
        model = Net()
    model.load_state_dict(float_model.state_dict(), strict=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fakequant.dequantize(model).eval()(x), float_model.eval()(x))


def test_model_built_under_the_patch_calibrates_and_runs_afterwards():
    with patched_torch_nn():
        model = Net()
    fakequant.calibrate(model, [torch.randn(2, 3, 8, 8)], progress=False)
    assert model.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_torchvision_model_built_under_the_patch(torchvision_models):
    state = torchvision_models.resnet18(num_classes=3).state_dict()
    with patched_torch_nn():
        model = torchvision_models.resnet18(num_classes=3)
    model.load_state_dict(state, strict=True)
    assert sum(isinstance(module, QuantConv2d) for module in model.modules()) == 20


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Linear"])
def test_device_and_dtype_arguments_go_through_the_patch(name):
    with patched_torch_nn():
        layer = getattr(nn, name)(*([4, 6, 3] if "Conv" in name else [4, 6]), device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)


def test_default_device_context_goes_through_the_patch():
    with torch.device("meta"), patched_torch_nn():
        layer = nn.Linear(2, 2)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1),
        lambda: (nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2),
    ],
    ids=["TransformerEncoderLayer", "TransformerDecoderLayer"],
)
def test_torchs_own_compound_modules_work_as_before(make, training):
    expected, arguments = make()
    with patched_torch_nn():
        module, _ = make()
    module.load_state_dict(expected.state_dict())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        actual, wanted = (m.train(training)(*[x] * arguments) for m in (module, expected))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_enable_onnx_export_changes_nothing():
    with enable_onnx_export():
        assert QuantLinear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
