import copy

import numpy as np
import pytest
import torch

from fakequant.errors import InvalidValueError
from fakequant.nn import Clip
from fakequant.nn.functional import clip

X = [-2.0, -1.0, 0.5, 1.0, 2.0]
bounds = pytest.mark.parametrize(
    "bound",
    [1, 1.0, np.float32(1.0), np.ones(1), [1.0], torch.tensor(1.0), torch.ones(1), torch.tensor(1)],
    ids=["int", "float", "float32", "array", "list", "0-d", "1-d", "int64"],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)


@bounds
def test_fixed_bounds_clamp(bound):
    assert Clip(-1.0, bound)(torch.tensor(X)).tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0]


@bounds
def test_learned_bounds_clamp(bound):
    module = Clip(-1.0, bound, learn_min=True, learn_max=True)
    assert module(torch.tensor(X)).tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(("learn_min", "learn_max"), [(False, False), (True, False), (False, True), (True, True)])
def test_only_learned_bounds_are_parameters(learn_min, learn_max):
    names = {name for name, _ in Clip(-1.0, 1.0, learn_min, learn_max).named_parameters()}
    assert ("clip_value_min" in names, "clip_value_max" in names) == (learn_min, learn_max)


def test_learned_bounds_get_the_gradient_at_and_beyond_them():
    module = Clip(-1.0, 1.0, learn_min=True, learn_max=True)
    x = torch.tensor(X, requires_grad=True)
    module(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert x.grad.tolist() == [0.0, 0.0, 4.0, 0.0, 0.0]
    assert module.clip_value_min.grad == 3.0
    assert module.clip_value_max.grad == 24.0


def test_fixed_bounds_get_no_gradient():
    module = Clip(-1.0, 1.0)
    module(torch.tensor(X, requires_grad=True)).sum().backward()
    assert module.clip_value_min.grad is module.clip_value_max.grad is None


def test_the_initial_tensor_is_not_trained():
    start = torch.tensor(1.0)
    with torch.no_grad():
        Clip(-1.0, start, learn_max=True).clip_value_max.fill_(5.0)
    assert start == 1.0


@dtypes
def test_the_dtype_of_the_inputs_is_kept(dtype):
    assert Clip(-1.0, 1.0)(torch.tensor(X, dtype=dtype)).dtype == dtype


@dtypes
def test_learned_bounds_have_their_gradient_in_float32(dtype):
    module = Clip(-1.0, 1.0, learn_max=True)
    module(torch.tensor(X, dtype=dtype)).sum().backward()
    assert (module.clip_value_max.grad.item(), module.clip_value_max.grad.dtype) == (2.0, torch.float32)


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_the_state_dict_of_one_fits_another(learn):
    one, other = Clip(-2.0, 3.0, learn, learn), Clip(-1.0, 1.0, learn, learn)
    other.load_state_dict(one.state_dict())
    assert other(torch.tensor([-9.0, 9.0])).tolist() == [-2.0, 3.0]


def test_a_copy_has_bounds_of_its_own():
    one = Clip(-1.0, 1.0, learn_max=True)
    other = copy.deepcopy(one)
    with torch.no_grad():
        one.clip_value_max.fill_(5.0)
    assert other.clip_value_max == 1.0


@pytest.mark.parametrize("bound", [[1.0, 2.0], torch.empty(0)], ids=["two", "none"])
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_a_bound_that_is_no_scalar_is_refused(learn, bound):
    with pytest.raises(InvalidValueError, match=r"clip_value_max: expected one element, got shape \("):
        Clip(-1.0, bound, learn_max=learn)


def test_function_keeps_nan():
    assert clip(torch.tensor(torch.nan), torch.tensor(-1.0), torch.tensor(1.0)).isnan()


def test_function_bounds_broadcast():
    x = torch.tensor([[-3.0, 3.0], [-3.0, 3.0]])
    low, high = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[1.0], [2.0]])
    assert clip(x, low, high).tolist() == [[-1.0, 1.0], [-2.0, 2.0]]


def test_function_bounds_get_their_gradient_in_their_own_shape():
    high = torch.tensor([[1.0], [2.0]], requires_grad=True)
    clip(torch.full((2, 3), 9.0), torch.tensor(-1.0), high).sum().backward()
    assert high.grad.tolist() == [[3.0], [3.0]]


def test_gradient_is_that_of_finite_differences():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.503, 0.707))
    assert torch.autograd.gradcheck(clip, (x, low, high))
