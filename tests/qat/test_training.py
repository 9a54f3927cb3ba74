"""Quantization-aware training of a calibrated tiny model is ordinary training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fakequant
from fakequant.call_sites import call_sites
from fakequant.nn import QuantLinear, TensorQuantizer

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Images and whether their left half is brighter."""
    x = torch.randn(64, 1, 6, 6)
    return x, (x[..., :3].sum((1, 2, 3)) > x[..., 3:].sum((1, 2, 3))).long()


class Residual(nn.Module):
    """A convolution around which its input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


@pytest.fixture(params=[False, True], ids=["layers", "layers and call sites"])
def model(request, data) -> nn.Module:
    first = nn.Conv2d(1, 4, 3, bias=False)
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), Residual(), nn.Flatten(), nn.Linear(64, 2))
    recipe = fakequant.preset("int8")
    if request.param:  # small layers, which would stay float
        recipe = recipe + fakequant.Rule(type="Conv2d", force=True) + fakequant.Rule(type="Linear", force=True)
    fakequant.quantize(model, recipe, example_inputs=data[0] if request.param else None)
    assert len(list(call_sites(model))) == request.param
    fakequant.calibrate(model, [data[0]], "entropy", progress=False)
    return model


def train(model: nn.Module, data: tuple[Tensor, Tensor], optimizer: str = "sgd", steps: int = 20) -> list[float]:
    """Return the loss of every step."""
    step = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(data[0]), data[1])
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses


def amaxes(model: nn.Module) -> list[list[float]]:
    return [m.amax.tolist() for m in model.modules() if isinstance(m, TensorQuantizer)]


@every_optimizer
def test_loss_falls(model, data, optimizer):
    losses = train(model, data, optimizer)
    assert losses[-1] < 0.5 * losses[0]


@every_optimizer
def test_every_parameter_moves(model, data, optimizer):
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, data, optimizer, steps=2)
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_trained_model_is_quantized(model, data):
    train(model, data)
    model.eval()
    quantized = model(data[0])
    assert not torch.equal(fakequant.dequantize(copy.deepcopy(model))(data[0]), quantized)


def test_ranges_are_no_parameters(model):
    assert not any("quantizer" in name for name, _ in model.named_parameters())


def test_learned_range_trains(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    learned = fakequant.QuantDescriptor(learn_amax=True)
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule("1", input=learned))
    fakequant.calibrate(model, [data[0]], "percentile", percentile=90, progress=False)
    before = amaxes(model)
    train(model, data)
    assert amaxes(model)[0] != before[0]


def test_input_gradient_stops_outside_the_range():
    layer = QuantLinear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
    layer.input_quantizer.amax = layer.weight_quantizer.amax = 1.0
    x = torch.tensor([[0.5, 2.0, -2.0]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0]]


def test_weight_gradient_is_the_quantized_input_inside_the_range():
    layer = QuantLinear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, 2.0, -2.0]]))
    layer.input_quantizer.amax = layer.weight_quantizer.amax = 1.0
    x = torch.tensor([[0.3, 0.3, 0.3]])
    layer(x).sum().backward()
    code = round(0.3 * 127) / 127
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[code, 0, 0]]))


def test_gradient_reaches_the_layers_before(model, data):
    x = data[0].clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_average_of_weights_has_the_ranges(model, data):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(model, data, steps=3)
    average.update_parameters(model)
    assert amaxes(average) == amaxes(model)


def test_average_of_weights_is_an_average(model, data):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    before = model[-1].weight.detach().clone()
    train(model, data, steps=3)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[-1].weight, (before + model[-1].weight) / 2)


def test_deepcopy_does_not_follow_the_training(model, data):
    copied, x = copy.deepcopy(model).eval(), data[0]
    before = copied(x)
    train(model, data)
    assert torch.equal(copied(x), before)
