"""Each scheme against its paper: worked numbers, and an independent reference for the gradients."""

import numpy as np
import pytest
import torch

from fakequant import arithmetic
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import fake_quantize, fake_quantize_on
from fakequant.schemes import scheme_for

TWN, BNN, XNOR = (QuantDescriptor(bits, scheme=name) for name, bits in (("twn", 2), ("bnn", 1), ("xnor", 1)))

dorefa_bits = pytest.mark.parametrize("num_bits", range(2, 9))


def dorefa(num_bits):
    return QuantDescriptor(num_bits, scheme="dorefa")


def values_and_gradient(grid, x, grad):
    x = torch.as_tensor(x).clone().requires_grad_()
    values = scheme_for(grid).fake_quantize(x, grid)
    values.backward(torch.as_tensor(grad))
    return values.detach(), x.grad


# Ternary weights


def test_ternary_weights_worked_by_hand():
    # mean |w| = 0.8, threshold 0.56; scale = (0.6 + 2 + 1) / 3 = 1.2.
    codes, scale, _ = scheme_for(TWN).codes(torch.tensor([0.6, -2.0, 0.1, 1.0, -0.3]), TWN)
    assert codes.tolist() == [1.0, -1.0, 0.0, 1.0, 0.0]
    assert scale.item() == pytest.approx(1.2)


def test_ternary_weights_of_each_channel_worked_by_hand():
    # Thresholds 0.7 * 2 and 0.7 * 1; scales 3 and 2.
    grid = TWN.replace(axis=0)
    codes, scale, _ = scheme_for(grid).codes(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), grid)
    assert codes.tolist() == [[0.0, -1.0], [1.0, 0.0]]
    assert scale.tolist() == [[3.0], [2.0]]


def test_the_ternary_scale_is_the_best_for_its_codes():
    w = torch.randn(1000)
    codes, scale, _ = scheme_for(TWN).codes(w, TWN)
    errors = [(w - codes * scale * factor).square().sum() for factor in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1]


def test_a_normal_tensor_loses_about_as_little_as_with_the_best_threshold():
    w = torch.randn(4000)
    error = (w - scheme_for(TWN).fake_quantize(w, TWN)).square().mean().item()
    # Exhaustive: with the k largest kept, the error is the energy less (sum of the k largest)**2 / k.
    sums = w.abs().sort(descending=True).values.cumsum(0)
    least = (w.square().sum() - (sums.square() / torch.arange(1, 4001)).max()).item() / 4000
    assert least <= error < 1.02 * least


def test_the_gradient_of_ternary_weights_passes_unchanged():
    _, gradient = values_and_gradient(TWN, [0.1, -5.0, 1.0], [1.0, 2.0, 3.0])
    assert gradient.tolist() == [1.0, 2.0, 3.0]


# Signs


def test_signs_worked_by_hand():
    values, gradient = values_and_gradient(BNN, [-1.5, -1.0, -0.2, 0.0, 1.0, 1.1], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert values.tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
    assert gradient.tolist() == [0.0, 2.0, 4.0, 8.0, 16.0, 0.0]


def test_scaled_signs_worked_by_hand():
    # alpha = (0.5 + 1.5 + 0 + 4) / 4 = 1.5; the gradient is times 1/4 + 1.5 * (|w| <= 1).
    values, gradient = values_and_gradient(XNOR, [-0.5, 1.5, 0.0, -4.0], [1.0, 1.0, 2.0, 2.0])
    assert values.tolist() == [-1.5, 1.5, 1.5, -1.5]
    assert gradient.tolist() == [1.75, 0.25, 3.5, 0.5]


def test_scaled_signs_of_each_filter_worked_by_hand():
    # alphas 1 and 3, two weights each.
    values, gradient = values_and_gradient(XNOR.replace(axis=0), [[0.5, -1.5], [5.0, -1.0]], torch.ones(2, 2))
    assert values.tolist() == [[1.0, -1.0], [3.0, -3.0]]
    assert gradient.tolist() == [[1.5, 0.5], [0.5, 3.5]]


def test_the_scale_of_signs_is_the_best():
    w = torch.randn(1000)
    codes, scale, _ = scheme_for(XNOR).codes(w, XNOR)
    errors = [(w - codes * scale * factor).square().sum() for factor in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1]


# DoReFa


def reference_quantize(r, num_bits):
    high = 2**num_bits - 1
    return np.round(high * r) / high


@dorefa_bits
def test_dorefa_weights_are_the_papers_formula(num_bits):
    w = torch.randn(1000)
    bent = np.tanh(w.numpy().astype(np.float64))
    expected = 2 * reference_quantize(bent / (2 * np.abs(bent).max()) + 0.5, num_bits) - 1
    values = scheme_for(dorefa(num_bits)).fake_quantize(w, dorefa(num_bits))
    steps = (values.double().numpy() - expected) * (2**num_bits - 1) / 2
    assert np.abs(steps).max() < 1e-3


@dorefa_bits
def test_dorefa_codes_are_odd_and_reach_both_ends(num_bits):
    high = 2**num_bits - 1
    w = torch.cat([torch.randn(5000), torch.tensor([9.0, -9.0])])
    codes, scale, _ = scheme_for(dorefa(num_bits)).codes(w, dorefa(num_bits))
    assert (codes % 2 == 1).all()
    assert (codes.min(), codes.max()) == (-high, high)
    assert scale.item() == np.float32(1 / high)


@dorefa_bits
def test_the_gradient_of_dorefa_weights_goes_through_tanh_and_its_maximum(num_bits):
    w, grad = torch.randn(50, dtype=torch.float64), torch.randn(50)
    reference = w.clone().requires_grad_()
    (reference.tanh() / reference.tanh().abs().max()).backward(grad.double())
    _, gradient = values_and_gradient(dorefa(num_bits), w.float(), grad)
    torch.testing.assert_close(gradient, reference.grad.float(), rtol=1e-4, atol=1e-5)


def test_what_dorefa_rounds_has_the_gradient_of_finite_differences():
    w, grad, epsilon = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64), 1e-6

    def smooth(v):
        bent = np.tanh(v)
        return float((bent / np.abs(bent).max() * grad.numpy()).sum())

    numeric = [
        (smooth(w.numpy() + epsilon * unit) - smooth(w.numpy() - epsilon * unit)) / (2 * epsilon) for unit in np.eye(20)
    ]
    _, gradient = values_and_gradient(dorefa(4), w.float(), grad.float())
    assert gradient.tolist() == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_one_bit_of_dorefa_is_the_mean_times_the_sign():
    values, gradient = values_and_gradient(dorefa(1), [-0.5, 1.5, 0.0, -4.0], [1.0, 2.0, 3.0, 4.0])
    assert values.tolist() == [-1.5, 1.5, 1.5, -1.5]
    assert gradient.tolist() == [1.0, 2.0, 3.0, 4.0]


@dorefa_bits
def test_activations_of_dorefa_are_an_unsigned_grid_up_to_1(num_bits):
    x = torch.randn(1000, requires_grad=True)
    grid = QuantDescriptor(num_bits, unsigned=True, amax=1.0)
    scale = arithmetic.scale_from_amax(torch.tensor(grid.amax), arithmetic.maxbound_of(grid))
    values = fake_quantize(x, scale, *arithmetic.bounds_of(grid))
    expected = reference_quantize(np.clip(x.detach().double().numpy(), 0, 1), num_bits)
    assert np.abs(values.detach().double().numpy() - expected).max() * (2**num_bits - 1) < 1e-3


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(lambda x: x.clamp(0, 1), [0, 0, 1, 1, 0, 0]), (lambda x: x, [0, 1, 1, 1, 1, 0])],
    ids=["behind the network's clip", "alone, to half a step of 1/3 beyond"],
)
def test_the_gradient_of_dorefa_activations_worked_by_hand(bound, expected):
    x = torch.tensor([-0.2, -0.1, 0.4, 0.9, 1.1, 1.2], requires_grad=True)
    values = fake_quantize_on(QuantDescriptor(2, unsigned=True), bound(x), torch.tensor(1.0))
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, 0, 1 / 3, 1, 1, 1])
    assert x.grad.tolist() == expected
