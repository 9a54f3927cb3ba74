import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fakequant import dequantize
from fakequant.arithmetic import quantize_gradient
from fakequant.errors import InvalidValueError
from fakequant.nn import QuantConv2d, QuantLinear, QuantMultiheadAttention
from fakequant.qat import quantize_gradients


def on_grid(grad, num_bits):
    """The distance of each element from the nearest of the 2**num_bits values of its sample."""
    high = 2**num_bits - 1
    amax = grad.abs().flatten(1).amax(1).reshape(-1, *[1] * (grad.ndim - 1))
    codes = (grad / amax + 1) / 2 * high
    return (codes - codes.round()).abs().max().item()


# The formula


def test_equation_12_worked_by_hand():
    # m = 4 and high = 3: g / 8 + 1/2 = [0.625, 0, 0.5, 1]; times 3 plus noise: [1.875, 0.4, 1.9, 3.3] -> [2, 0, 2, 3].
    grad, noise = torch.tensor([[1.0, -4.0, 0.0, 4.0]]), torch.tensor([[0.0, 0.4, 0.4, 0.3]])
    expected = [8 * (code / 3 - 0.5) for code in (2, 0, 2, 3)]
    assert quantize_gradient(grad, 2, noise).tolist()[0] == pytest.approx(expected)


@pytest.mark.parametrize("noise", [-0.5, 0.5])
def test_noise_takes_nothing_beyond_the_maximum(noise):
    grad = torch.tensor([[-4.0, 4.0]])
    values = quantize_gradient(grad, 3, torch.full((1, 2), noise))
    assert values.abs().max() <= 4.0


def test_each_sample_has_its_own_range():
    grad = torch.tensor([[1.0, -0.9], [100.0, -90.0]])
    values = quantize_gradient(grad, 4, torch.zeros(2, 2))
    torch.testing.assert_close(values[1], 100 * values[0])


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_it_is_right_on_average(num_bits):
    grad = torch.tensor([[1.0, 0.3, -0.71, -0.05]])
    noise = torch.rand(20_000, 1, 4) - 0.5
    mean = torch.stack([quantize_gradient(grad, num_bits, n) for n in noise[:2000]]).mean(0)
    step = 2 / (2**num_bits - 1)
    assert (mean - grad).abs().max() < 0.05 * step


def test_a_sample_without_gradient_stays_so():
    grad = torch.stack([torch.zeros(5), torch.ones(5)])
    assert quantize_gradient(grad, 4, torch.rand(2, 5) - 0.5)[0].tolist() == [0.0] * 5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(value):
    grad = torch.tensor([[1.0, value], [1.0, 2.0]])
    values = quantize_gradient(grad, 4, torch.zeros(2, 2))
    assert not values[0].isfinite().any()
    assert values[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    grad, noise = torch.randn(3, 7).to(dtype), torch.rand(3, 7) - 0.5
    values = quantize_gradient(grad, 4, noise)
    assert torch.equal(values, quantize_gradient(grad.float(), 4, noise).to(dtype))


@given(num_bits=st.integers(1, 8), seed=st.integers(0, 1000))
def test_values_are_on_the_grid(num_bits, seed):
    generator = torch.Generator().manual_seed(seed)
    grad, noise = torch.randn(3, 7, generator=generator), torch.rand(3, 7, generator=generator) - 0.5
    codes = quantize_gradient(grad, num_bits, noise) / grad.abs().amax(1, keepdim=True)
    codes = (codes + 1) / 2 * (2**num_bits - 1)
    assert (codes - codes.round()).abs().max() < 1e-4


# In a model


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Sequential(QuantConv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), QuantLinear(48, 4))


@pytest.fixture
def batch():
    return torch.randn(5, 2, 6, 6)


def gradients_into(model, batch):
    """The gradient from which the convolution computes its own."""
    seen = []

    def observe(module, inputs, output):
        output.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))

    model[0].register_forward_hook(observe)
    model(batch).square().sum().backward()
    return seen[0]


def test_the_forward_pass_is_unchanged(model, batch):
    expected = model(batch)
    quantize_gradients(model, 2)
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("num_bits", [2, 6])
def test_a_layer_computes_its_gradients_from_few_bits(model, batch, num_bits):
    quantize_gradients(model, num_bits)
    assert on_grid(gradients_into(model, batch), num_bits) < 1e-3


def test_without_it_gradients_have_all_their_bits(model, batch):
    assert on_grid(gradients_into(model, batch), 6) > 0.1


def test_the_gradient_of_the_last_bias_is_the_sum_of_quantized_gradients(model, batch):
    model(batch).square().sum().backward()
    plain, model[3].bias.grad = model[3].bias.grad, None
    quantize_gradients(model, 2)
    output = model(batch)
    output.square().sum().backward()
    amax = (2 * output.detach()).abs().amax(1, keepdim=True)
    steps = (plain - model[3].bias.grad).abs() / amax.sum()
    assert 0 < steps.max() < 1


def test_noise_comes_from_the_default_generator(model, batch):
    quantize_gradients(model, 2)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.zero_grad()
        model(batch).square().sum().backward()
        results.append(model[0].weight.grad.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_remove_gives_the_float_gradients_back(model, batch):
    model(batch).square().sum().backward()
    expected = model[0].weight.grad.clone()
    quantize_gradients(model, 2).remove()
    model.zero_grad()
    model(batch).square().sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


def test_a_model_that_is_made_float_has_float_gradients(model, batch):
    quantize_gradients(model, 2)
    floating = dequantize(copy.deepcopy(model))
    expected = copy.deepcopy(floating)
    for module in expected.modules():
        module._forward_hooks.clear()
    for each in (floating, expected):
        each(batch).square().sum().backward()
    for ours, other in zip(floating.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)


def test_evaluation_without_gradient_works(model, batch):
    quantize_gradients(model, 2)
    with torch.no_grad():
        assert not model(batch).requires_grad


def test_a_model_with_quantized_gradients_trains(model, batch):
    quantize_gradients(model, 4)
    optimizer, target, losses = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(5, 4), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_float_layers_are_left_alone(batch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), QuantLinear(48, 4))
    quantize_gradients(model, 2)
    assert on_grid(gradients_into(model, batch), 2) > 0.01


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(InvalidValueError, match="model: expected a quantized model, got no quantizer in Linear"):
        quantize_gradients(nn.Linear(2, 2), 4)


@pytest.mark.parametrize("num_bits", [0, 17])
def test_a_number_of_bits_out_of_range_is_refused(model, num_bits):
    with pytest.raises(InvalidValueError, match=f"num_bits: expected 1 to 16, got {num_bits}"):
        quantize_gradients(model, num_bits)


def test_the_gradient_of_an_attention_gets_noise_once(monkeypatch):
    torch.manual_seed(0)
    model = QuantMultiheadAttention(8, 2)
    calls = []
    monkeypatch.setattr("fakequant.qat.gradients._quantized", lambda num_bits, grad: calls.append(grad.shape))
    quantize_gradients(model, 4)
    x = torch.randn(3, 1, 8)
    model(x, x, x, need_weights=False)[0].sum().backward()
    assert len(calls) == 1
