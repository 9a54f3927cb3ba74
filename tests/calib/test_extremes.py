import pytest
import torch

from fakequant.calib.extremes import finite_extremes
from fakequant.errors import InvalidTypeError


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), (0, 1, 2)])
def test_each_kept_index_has_its_own_extremes(axis):
    x = torch.randn(3, 4, 5)
    axes = () if axis is None else tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    reduced = [d for d in range(3) if d not in axes]
    expected = x.numpy().min(tuple(reduced), keepdims=axis is not None)
    assert torch.equal(finite_extremes(x, axis).minimum, torch.as_tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_extremes_are_float32(dtype):
    extremes = finite_extremes(torch.tensor([0, 1]).to(dtype))
    assert (extremes.minimum.dtype, extremes.maximum.dtype) == (torch.float32, torch.float32)
    assert (extremes.minimum.item(), extremes.maximum.item()) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("axis", [None, 0])
def test_what_is_not_finite_is_left_out(bad, axis):
    extremes = finite_extremes(torch.tensor([[bad, -1.0, 2.0]]), axis)
    assert (extremes.minimum.item(), extremes.maximum.item()) == (-1.0, 2.0)


def test_nan_and_inf_are_counted():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan])
    assert finite_extremes(x)[2:] == (3, 2)


def test_a_double_beyond_float32_is_infinite():
    assert finite_extremes(torch.tensor([1e300, 1.0], dtype=torch.float64)).num_inf == 1


def test_nothing_finite_has_reversed_extremes():
    extremes = finite_extremes(torch.tensor([torch.nan]))
    assert (extremes.minimum.item(), extremes.maximum.item()) == (torch.inf, -torch.inf)


def test_the_result_shares_no_memory():
    x = torch.ones(3)
    extremes = finite_extremes(x, axis=0)
    x.zero_()
    assert extremes.maximum.tolist() == [1.0, 1.0, 1.0]


def test_complex_is_refused():
    with pytest.raises(InvalidTypeError, match="real"):
        finite_extremes(torch.ones(1, dtype=torch.complex64))
