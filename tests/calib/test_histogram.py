import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakequant.calib.histogram import BINS, MIN_EXPONENT, Histogram
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError

floats = st.lists(st.floats(width=32), max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float32))
batches = st.lists(floats, min_size=1, max_size=5)


def assert_same(a: Histogram, b: Histogram) -> None:
    for one, other in zip(
        (a.counts, a.exponent, *a.extremes[:2]), (b.counts, b.exponent, *b.extremes[:2]), strict=True
    ):
        assert one.dtype == other.dtype
        # Bytes, so that -0.0 and 0.0 differ.
        assert one.numpy().tobytes() == other.numpy().tobytes()
    assert a.extremes[2:] == b.extremes[2:]


def merged(histograms: list[Histogram]) -> Histogram:
    result = histograms[0]
    for histogram in histograms[1:]:
        result = result.merge(histogram)
    return result


def oracle(x: np.ndarray, exponent: int) -> np.ndarray:
    counts = np.zeros(BINS, dtype=np.int64)
    for value in np.abs(x.astype(np.float64)) / 2.0**exponent:
        counts[int(value)] += 1
    return counts


def test_counts_are_those_of_the_oracle(values):
    h = Histogram.of(values[:3000])
    assert np.array_equal(h.counts[0].numpy(), oracle(values[:3000].numpy(), int(h.exponent)))


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(1.0, -11), (2.0 - 2**-23, -12 + 1), (2.0, -10), (3.4e38, 116), (1e-45, MIN_EXPONENT), (0.0, MIN_EXPONENT)],
)
def test_exponent_is_a_function_of_the_maximum(amax, exponent):
    assert Histogram.of(torch.tensor([amax, -amax / 3])).exponent.tolist() == [exponent]


@pytest.mark.parametrize("exponent", range(-114, 128))
def test_a_power_of_two_is_in_the_middle_bin_at_every_scale(exponent):
    h = Histogram.of(torch.tensor([2.0**exponent]))
    assert h.counts[0].nonzero().tolist() == [[BINS // 2]]


@given(batches)
def test_a_concatenation_is_the_merge_of_its_parts(parts):
    assert_same(Histogram.of(torch.cat(parts)), merged([Histogram.of(p) for p in parts]))


@given(floats, floats)
def test_merge_commutes(a, b):
    a, b = Histogram.of(a), Histogram.of(b)
    assert_same(a.merge(b), b.merge(a))


@given(floats, floats, floats)
def test_merge_associates(a, b, c):
    a, b, c = Histogram.of(a), Histogram.of(b), Histogram.of(c)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(floats, st.randoms())
def test_order_does_not_matter(x, random):
    shuffled = random.sample(range(len(x)), len(x))
    assert_same(Histogram.of(x), Histogram.of(x[shuffled]))


# Only rows with a maximum of 2**-100 to 2**100 keep clear of the smallest width, and of infinity.
@given(
    st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=40),
    st.integers(-14, 20),
)
def test_scaling_by_a_power_of_two_moves_the_exponent_only(values, power):
    x = torch.tensor(values)
    a, b = Histogram.of(x), Histogram.of(x * 2.0**power)
    assert torch.equal(a.counts, b.counts)
    assert b.exponent.tolist() == (a.exponent + power).tolist()


@settings(max_examples=30)
@given(st.lists(floats, min_size=2, max_size=4))
def test_merging_rows_is_merging_each_row(parts):
    half = len(parts) // 2
    a = [Histogram.of(p) for p in parts[:half]]
    b = [Histogram.of(p) for p in parts[half : 2 * half]]
    rows = Histogram.stack(a).merge(Histogram.stack(b))
    assert_same(rows, Histogram.stack([x.merge(y) for x, y in zip(a, b, strict=True)]))


def test_a_bin_counts_beyond_the_integers_of_float32():
    h = Histogram.of(torch.ones(2**12 + 1))
    for _ in range(13):
        h = h.merge(h)
    assert h.count.tolist() == [(2**12 + 1) * 2**13]
    assert h.counts.max() == (2**12 + 1) * 2**13 > 2**24


def test_more_values_than_a_chunk_are_all_counted():
    x = torch.linspace(-1, 1, 2**20 + 3)
    assert_same(Histogram.of(x), merged([Histogram.of(p) for p in x.split(100_000)]))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (2, 0), (0, 1, 2, 3)])
def test_a_row_is_the_histogram_of_its_slice(axis):
    x = torch.randn(3, 4, 2, 5)
    axes = sorted(a % 4 for a in (axis if isinstance(axis, tuple) else (axis,)))
    slices = x.movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1)
    assert_same(Histogram.of(x, axis), Histogram.stack([Histogram.of(s) for s in slices]))


def test_rows_with_more_values_than_a_chunk_are_all_counted():
    x = torch.randn(2, 2**19 + 5)
    assert_same(Histogram.of(x, axis=0), Histogram.stack([Histogram.of(row) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8])
def test_every_dtype_counts_as_float32(dtype):
    x = (torch.randn(1000) * 40).abs().to(dtype)
    assert_same(Histogram.of(x), Histogram.of(x.float()))


def test_the_lowest_int8_does_not_overflow():
    assert Histogram.of(torch.tensor([-128, 127], dtype=torch.int8)).amax.tolist() == [128.0]


def test_complex_is_refused():
    with pytest.raises(InvalidTypeError, match="expected a real tensor, got torch.complex64"):
        Histogram.of(torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.expand(2, *x.shape),
    ],
    ids=["channels_last", "transposed", "strided", "expanded"],
)
def test_memory_layout_does_not_matter(view):
    x = view(torch.randn(2, 3, 4, 5))
    assert_same(Histogram.of(x), Histogram.of(x.clone(memory_format=torch.contiguous_format)))


def test_minimum_and_maximum_are_exact_and_signed():
    h = Histogram.of(torch.tensor([0.1, -0.3, 0.2]))
    assert torch.equal(h.extremes.minimum, torch.tensor([-0.3]))
    assert torch.equal(h.extremes.maximum, torch.tensor([0.2]))


def test_negative_zero_is_zero():
    assert not Histogram.of(torch.tensor([-0.0])).extremes.minimum.signbit().any()


@pytest.mark.parametrize("axis", [None, 0])
def test_nan_and_inf_are_counted_and_left_out(axis):
    nan, inf = torch.nan, torch.inf
    h = Histogram.of(torch.tensor([[1.0, nan, -2.0], [inf, -inf, 0.0], [nan, nan, inf]]), axis)
    assert h.extremes[2:] == (3, 3)
    assert h.count.tolist() == ([3] if axis is None else [2, 1, 0])
    assert h.amax.tolist() == ([2.0] if axis is None else [2.0, 0.0, 0.0])


@pytest.mark.parametrize(("shape", "axis", "rows"), [((0,), None, 1), ((0, 3), 1, 3), ((0, 3), 0, 0), ((2, 0), 0, 2)])
def test_an_empty_tensor_gives_empty_rows(shape, axis, rows):
    h = Histogram.of(torch.empty(shape), axis)
    assert h.counts.shape == (rows, BINS)
    assert not h.count.any()


def test_an_empty_row_has_no_extremes():
    h = Histogram.of(torch.empty(0))
    assert (h.extremes.minimum.item(), h.extremes.maximum.item(), h.amax.item()) == (torch.inf, -torch.inf, 0.0)


def test_a_scalar_is_one_value():
    assert Histogram.of(torch.tensor(-3.0)).amax.tolist() == [3.0]


def test_data_and_gradient_are_left_alone():
    x = torch.randn(100, requires_grad=True)
    before = x.detach().clone()
    h = Histogram.of(x)
    assert torch.equal(x.detach(), before)
    assert not h.extremes.minimum.requires_grad


def test_rows_of_different_number_do_not_merge():
    with pytest.raises(CalibrationError, match="expected 1 rows, got 2"):
        Histogram.of(torch.ones(2)).merge(Histogram.of(torch.ones(2, 2), axis=0))


def test_an_empty_stack_is_refused():
    with pytest.raises(InvalidValueError, match="expected one or more"):
        Histogram.stack([])


def test_stack_adds_up_what_was_not_finite():
    h = Histogram.of(torch.tensor([torch.nan, torch.inf, 1.0]))
    stacked = Histogram.stack([h, h])
    assert stacked.extremes[2:] == (2, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_a_histogram_is_a_value(copied):
    h = Histogram.of(torch.randn(100))
    assert_same(h, copied(h))


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [None, 1])
def test_a_gpu_counts_the_same(axis):
    x = torch.randn(64, 32, 9, 9)
    assert_same(Histogram.of(x, axis), Histogram.of(x.cuda(), axis).to("cpu"))
