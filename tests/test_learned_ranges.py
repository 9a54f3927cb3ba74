"""LSQ, LSQ+ and PACT against the papers: worked numbers, and autograd of their own pseudocode in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakequant import arithmetic
from fakequant.calib import Histogram, find_amax
from fakequant.descriptor import QuantDescriptor
from fakequant.fake_quantize import fake_quantize, fake_quantize_affine, learned
from fakequant.fake_quantize.learned import lsq, lsq_plus, pact

INT4, UINT4 = (-8, 7), (0, 15)
grids = pytest.mark.parametrize(("low", "high"), [INT4, UINT4, (-7, 7), (-128, 127)], ids=str)
shapes = pytest.mark.parametrize("shape", [(), (1, 3, 1, 1)], ids=["tensor", "channel"])
FUNCTIONS = {
    "lsq": (lambda x, amax, low=-8, high=7: lsq(x, amax, low, high, 25), [1.3]),
    "lsq+": (lambda x, amin, amax, low=0, high=15: lsq_plus(x, amin, amax, low, high, 25), [-0.61, 1.3]),
    "pact": (lambda x, amax, low=-8, high=7: pact(x, amax, low, high), [1.3]),
}
functions = pytest.mark.parametrize(("function", "bounds"), FUNCTIONS.values(), ids=FUNCTIONS)


def leaf(value, shape=()):
    return torch.as_tensor(value, dtype=torch.float32).expand(shape).clone().requires_grad_()


def backward(function, x, *ranges):
    """The result, and the gradients of x and of the ranges for an arbitrary gradient of the result."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    ranges = [bound.detach().clone().requires_grad_() for bound in ranges]
    result = function(x, *ranges)
    result.backward(torch.linspace(-1, 2, result.numel()).reshape(result.shape).to(result.dtype))
    return result.detach(), x.grad, *(bound.grad for bound in ranges)


# What the papers say, from appendix B of LSQ: gradscale and roundpass.


def gradscale(x, scale):
    return (x - x * scale).detach() + x * scale


def roundpass(x):
    return (x.round() - x).detach() + x


def paper_lsq(x, step, low, high, count):
    step = gradscale(step, 1 / math.sqrt(count * high))
    return roundpass((x / step).clamp(low, high)) * step


def paper_lsq_plus(x, step, offset, low, high, count):
    # The offset in use is a multiple of the step, as in a file; its gradient goes to the float one.
    in_use = (-offset / step).round() * -step
    offset = gradscale(offset + (in_use - offset).detach(), 1 / math.sqrt(count * high))
    step = gradscale(step, 1 / math.sqrt(count * high))
    return roundpass(((x - offset) / step).clamp(low, high)) * step + offset


def test_lsq_worked_by_hand():
    # s = 0.5, v = [-20, -3, 0.6, 1.5, 14]: round(v) - v = [low, 0, 0.4, 0.5, high]; 1 / sqrt(4 * 7) = 0.18898.
    x, amax = torch.tensor([-10.0, -1.5, 0.3, 0.75, 7.0], requires_grad=True), leaf(3.5)
    result = lsq(x, amax, -8, 7, count=4)
    result.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert result.tolist() == [-4.0, -1.5, 0.5, 1.0, 3.5]
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0]
    step_gradient = (1 * -8 + 2 * 0 + 4 * 0.4 + 8 * 0.5 + 16 * 7) / math.sqrt(28)
    assert amax.grad.item() == pytest.approx(7 * step_gradient)


def test_lsq_plus_worked_by_hand():
    # s = 0.5 and beta = -1, zero point 2: v = [-1, 2.6, 15, 20], round(v) - v = [low, 0.4, high, high].
    x, amin, amax = torch.tensor([-1.5, 0.3, 6.5, 9.0], requires_grad=True), leaf(-1.0), leaf(6.5)
    result = lsq_plus(x, amin, amax, 0, 15, count=60)
    result.backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert result.tolist() == [-1.0, 0.5, 6.5, 6.5]
    assert x.grad.tolist() == [0.0, 2.0, 0.0, 0.0]
    to_step, to_offset = (2 * 0.4 + 4 * 15 + 8 * 15) / 30, (1 + 4 + 8) / 30
    assert amax.grad.item() == pytest.approx(15 * to_step + to_offset)
    assert amin.grad.item() == pytest.approx(0 * to_step + to_offset)


def test_the_lower_end_of_a_signed_affine_range_gets_low_times_the_gradient_of_the_step():
    x, amin, amax = torch.tensor([0.3], requires_grad=True), leaf(-4.0), leaf(3.5)
    lsq_plus(x, amin, amax, -8, 7, count=7).sum().backward()
    assert (amin.grad.item(), amax.grad.item()) == pytest.approx((-8 * 0.4 / 7, 7 * 0.4 / 7))


@pytest.mark.parametrize(
    ("bounds", "to_x", "to_amax"),
    [(INT4, [0, 0, 4, 8, 0, 0], 16 + 32 - 1 - 2), (UINT4, [0, 0, 0, 8, 0, 0], 16 + 32)],
    ids=["int4", "uint4"],
)
def test_pact_worked_by_hand(bounds, to_x, to_amax):
    x, amax = torch.tensor([-9.0, -1.0, -0.4, 0.3, 1.0, 3.0], requires_grad=True), leaf(1.0)
    pact(x, amax, *bounds).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert x.grad.tolist() == to_x
    assert amax.grad.item() == to_amax


@grids
@functions
def test_values_are_those_of_a_range_that_is_not_learned(function, bounds, low, high):
    x, (*amin, amax) = torch.randn(1000), map(torch.tensor, bounds)
    if amin:
        fixed = fake_quantize_affine(x, *arithmetic.affine_parameters(*amin, amax, low, high), low, high)
    else:
        fixed = fake_quantize(x, arithmetic.scale_from_amax(amax, high), low, high)
    assert torch.equal(function(x, *amin, amax, low, high), fixed)


@grids
@shapes
def test_lsq_is_its_pseudocode(low, high, shape):
    x, amax = torch.randn(4, 3, 5, 5), torch.full(shape, 1.3)
    result, to_x, to_amax = backward(lambda x, amax: lsq(x, amax, low, high, 25), x, amax)
    step = amax.double() / high
    expected = backward(lambda x, step: paper_lsq(x, step, low, high, 25), x.double(), step)
    torch.testing.assert_close(result, expected[0].float())
    assert torch.equal(to_x, expected[1].float())
    torch.testing.assert_close(to_amax, (high * expected[2]).float())


@grids
@shapes
def test_lsq_plus_is_its_formulas_at_an_integer_zero_point(low, high, shape):
    x, amin, amax = torch.randn(4, 3, 5, 5), torch.full(shape, -0.61), torch.full(shape, 1.3)
    result, to_x, to_amin, to_amax = backward(lambda x, a, b: lsq_plus(x, a, b, low, high, 25), x, amin, amax)
    step = (amax - amin).double() / (high - low)
    offset = amin.double() - low * step
    expected = backward(lambda x, s, o: paper_lsq_plus(x, s, o, low, high, 25), x.double(), step, offset)
    torch.testing.assert_close(result, expected[0].float())
    assert torch.equal(to_x, expected[1].float())
    torch.testing.assert_close(to_amax, (high * expected[2] + expected[3]).float())
    torch.testing.assert_close(to_amin, (low * expected[2] + expected[3]).float())


def test_sgd_on_amax_takes_the_steps_of_lsq():
    x, low, high = torch.randn(300).double(), *INT4
    amax, step = leaf(2.0), torch.tensor(2.0 / high, dtype=torch.float64, requires_grad=True)
    ours, papers = torch.optim.SGD([amax], lr=0.001), torch.optim.SGD([step], lr=0.001)
    for _ in range(20):
        for optimizer, values in (
            (ours, lambda: lsq(x.float(), amax, low, high, 300)),
            (papers, lambda: paper_lsq(x, step, low, high, 300)),
        ):
            optimizer.zero_grad()
            (values() - 2 * x).square().sum().backward()
            optimizer.step()
    assert step.item() * high > 2.1
    assert amax.item() == pytest.approx(step.item() * high, rel=1e-4)


def test_sgd_on_both_ends_takes_the_steps_of_lsq_plus():
    x, target, low, high = torch.randn(300).double(), torch.randn(300).double() + 1, *UINT4
    amin, amax = leaf(-1.0), leaf(2.0)
    step, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, -1.0))
    ours, papers = torch.optim.SGD([amin, amax], lr=0.003), torch.optim.SGD([step, offset], lr=0.003)
    for _ in range(20):
        for optimizer, values in (
            (ours, lambda: lsq_plus(x.float(), amin, amax, low, high, 300)),
            (papers, lambda: paper_lsq_plus(x, step, offset, low, high, 300)),
        ):
            optimizer.zero_grad()
            (values() - target).square().sum().backward()
            optimizer.step()
    assert abs(offset.item() + 1.0) > 0.1
    assert amax.item() == pytest.approx(high * step.item() + offset.item(), rel=1e-4)
    assert amin.item() == pytest.approx(low * step.item() + offset.item(), rel=1e-4)


# All three


@functions
@shapes
def test_a_range_that_changed_its_sign_is_the_same_range(function, bounds, shape):
    x, ranges = torch.randn(4, 3, 5, 5), [torch.full(shape, bound) for bound in bounds]
    result, to_x, *to_ranges = backward(function, x, *ranges)
    mirrored = backward(function, x, *(-bound for bound in ranges))
    assert torch.equal(mirrored[0], result)
    assert torch.equal(mirrored[1], to_x)
    for to_mirrored, to_range in zip(mirrored[2:], to_ranges, strict=True):
        assert torch.equal(to_mirrored, -to_range)


@functions
def test_a_dead_range_is_finite_and_learns(function, bounds):
    x = torch.cat([torch.randn(100), torch.zeros(1)])
    result, _, *to_ranges = backward(function, x, *(torch.tensor(0.0) for _ in bounds))
    assert result.isfinite().all()
    assert all(gradient.isfinite() and gradient != 0 for gradient in to_ranges)


@functions
@shapes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(function, bounds, shape, dtype):
    x, ranges = torch.randn(2, 3, 5, 5).to(dtype), [torch.full(shape, bound) for bound in bounds]
    result, to_x, *to_ranges = backward(function, x, *ranges)
    expected = backward(function, x.float(), *ranges)
    assert (result.dtype, to_x.dtype) == (dtype, dtype)
    assert torch.equal(result, expected[0].to(dtype))
    assert torch.equal(to_x, torch.linspace(-1, 2, 150).reshape(x.shape).to(dtype) * (expected[1] != 0))
    for to_range, of_float32 in zip(to_ranges, expected[2:], strict=True):
        assert (to_range.dtype, to_range.shape) == (torch.float32, shape)
        torch.testing.assert_close(to_range, of_float32, rtol=0.02, atol=0.02)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "empty": lambda x: x[:, :, :0],
}


@functions
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (1, 3, 1, 1), (4, 1, 1, 1), (4, 3, 1, 1), (3, 1, 1)], ids=str)
def test_chunks_and_memory_layout_change_nothing(function, bounds, layout, shape, monkeypatch):
    x, ranges = layout(torch.randn(4, 3, 5, 5)), [torch.rand(shape) + bound for bound in bounds]
    expected = backward(function, x.contiguous(), *ranges)
    for chunk in (7, 160):
        monkeypatch.setattr(learned, "_CHUNK", chunk)
        result, to_x, *to_ranges = backward(function, x, *ranges)
        assert torch.equal(result, expected[0])
        assert torch.equal(to_x, expected[1])
        for to_range, of_one_chunk in zip(to_ranges, expected[2:], strict=True):
            torch.testing.assert_close(to_range, of_one_chunk)


@functions
def test_a_tensor_without_dimensions_works(function, bounds):
    result, to_x, *to_ranges = backward(function, torch.tensor(0.3), *map(torch.tensor, bounds))
    assert (result.shape, to_x.shape, to_ranges[0].shape) == ((), (), ())


@functions
@shapes
def test_one_graph_is_compiled(function, bounds, shape):
    x, ranges = torch.randn(4, 3, 5, 5), [torch.full(shape, bound) for bound in bounds]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(backward(compiled, x, *ranges), backward(function, x, *ranges), strict=True):
        torch.testing.assert_close(ours, expected)


@functions
def test_only_x_and_the_range_are_kept(function, bounds):
    x, ranges, kept = torch.randn(10, requires_grad=True), [leaf(bound) for bound in bounds], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        function(x, *ranges)
    assert set(kept) == {t.data_ptr() for t in (x, *ranges)}


@functions
def test_a_second_derivative_is_refused(function, bounds):
    x, ranges = torch.randn(10), [leaf(bound) for bound in bounds]
    gradient = torch.autograd.grad(function(x, *ranges).square().sum(), ranges[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.backward()


@functions
def test_nan_reaches_the_range(function, bounds):
    _, _, *to_ranges = backward(function, torch.tensor([0.1, torch.nan]), *map(torch.tensor, bounds))
    assert all(gradient.isnan() for gradient in to_ranges)


@given(
    amax=st.floats(2.0**-23, 2.0**60, width=32),
    steps=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20),
    grid=st.sampled_from([INT4, UINT4, (-128, 127)]),
)
def test_values_are_on_the_grid(amax, steps, grid):
    low, high = grid
    scale = amax / high
    x = torch.tensor(steps) * scale
    for values in (
        lsq(x, torch.tensor(amax), low, high, 1),
        pact(x, torch.tensor(amax), low, high),
        lsq_plus(x, torch.tensor(low * scale), torch.tensor(amax), low, high, 1),
    ):
        codes = values.double() / scale
        assert ((codes - codes.round()).abs() <= 1e-3).all()
        assert (codes.round() >= low).all()
        assert (codes.round() <= high).all()


# Training


@pytest.mark.parametrize("start", [0.3, 12.0])
def test_lsq_finds_about_the_least_error(start):
    x, amax = torch.randn(1000), leaf(start)
    optimizer = torch.optim.Adam([amax], lr=0.3)
    for _ in range(80):
        optimizer.zero_grad()
        (lsq(x, amax, *INT4, 1000) - x).square().mean().backward()
        optimizer.step()
    best = find_amax(Histogram.of(x), QuantDescriptor(4), "mse")
    error, least = ((lsq(x, a, *INT4, 1) - x).square().mean().item() for a in (amax, best))
    assert error < 1.1 * least


def test_lsq_plus_finds_a_range_that_is_not_symmetric():
    x = torch.nn.functional.silu(2 * torch.randn(1000))
    amin, amax = leaf(-2.0), leaf(2.0)
    optimizer = torch.optim.Adam([amin, amax], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        (lsq_plus(x, amin, amax, *UINT4, 1000) - x).square().mean().backward()
        optimizer.step()
    assert -0.6 < amin.item() < -0.1  # silu is never below -0.28; half a step of 0.3 more
    assert 3.0 < amax.item() < x.max().item()


# Where training starts


def test_lsq_starts_at_the_papers_step():
    # s = 2 * mean / sqrt(high) = 2 * 0.6 / 3 = 0.4, amax = 9 * 0.4.
    assert arithmetic.lsq_amax(torch.tensor(0.6), 9).item() == pytest.approx(3.6)


def test_weights_of_lsq_plus_start_at_three_sigma():
    # s = max(|0.5 - 3 * 0.2|, |0.5 + 3 * 0.2|) / 2**3 = 1.1 / 8, amax = 7 * s; a negative mean is the mirror image.
    amax = arithmetic.lsq_plus_weight_amax(torch.tensor([0.5, -0.5]), torch.tensor([0.2, 0.2]), 4)
    assert amax.tolist() == pytest.approx([7 * 1.1 / 8] * 2)


@pytest.mark.parametrize(("count", "expected"), [(1000, 1 / math.sqrt(127_000)), (0, 1 / math.sqrt(127))])
def test_the_gradient_scale_is_that_of_lsq(count, expected):
    assert arithmetic.lsq_gradient_scale(count, 127) == pytest.approx(expected)
