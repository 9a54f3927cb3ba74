"""What holds for every registered scheme."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fakequant import arithmetic
from fakequant.arithmetic import DEAD_SCALE
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import InvalidValueError
from fakequant.schemes import Scheme, register_scheme, scheme_for
from fakequant.schemes.scheme import SCHEMES

GRIDS = [
    QuantDescriptor(num_bits, scheme=name, axis=axis)
    for name, scheme in SCHEMES.items()
    for num_bits in scheme.num_bits
    for axis in ((None, 0, -1) if scheme.takes_axis else (None,))
]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)

# Sums of these are exact in any order.
dyadic = hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-1000, 1000).map(lambda n: n / 64))


def test_the_papers_schemes_are_registered():
    assert sorted(SCHEMES) == ["bnn", "dorefa", "twn", "xnor"]


def test_only_signs_are_for_activations_too():
    assert [name for name, scheme in SCHEMES.items() if not scheme.weights_only] == ["bnn"]


@grids
def test_a_scheme_is_found_by_its_name(grid):
    assert scheme_for(grid).name == grid.scheme


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InvalidValueError, match=r"scheme: expected one of \['bnn', .*'xnor'\], got 'tnn'"):
        scheme_for(QuantDescriptor(2, scheme="tnn"))


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(InvalidValueError, match="scheme: expected a new name, got 'twn', which is registered"):
        register_scheme("twn")(Scheme)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 8, "scheme": "twn"}, r"scheme 'twn': expected num_bits one of \[2\], got 8"),
        ({"num_bits": 2, "scheme": "bnn"}, r"scheme 'bnn': expected num_bits one of \[1\], got 2"),
        ({"num_bits": 9, "scheme": "dorefa"}, r"scheme 'dorefa': expected num_bits one of \[1, .* 8\], got 9"),
        ({"num_bits": (4, 3), "scheme": "dorefa"}, r"scheme 'dorefa': expected num_bits one of .*, got \(4, 3\)"),
        ({"num_bits": 1, "scheme": "bnn", "axis": 0}, "scheme 'bnn': expected axis None, got 0"),
        ({"num_bits": 4, "scheme": "dorefa", "axis": 0}, "scheme 'dorefa': expected axis None, got 0"),
        ({"num_bits": 2, "scheme": "twn", "block_size": 4}, "scheme 'twn': expected block_size None, got 4"),
    ],
    ids=str,
)
def test_a_field_without_a_formula_is_refused(fields, message):
    with pytest.raises(InvalidValueError, match=message):
        scheme_for(QuantDescriptor(**fields))


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_exactly_codes_times_scale(grid, dtype):
    x = torch.randn(4, 3, 5).to(dtype)
    codes, scale, zero_point = scheme_for(grid).codes(x, grid)
    assert zero_point is None
    assert torch.equal(scheme_for(grid).fake_quantize(x, grid), (codes * scale).to(dtype))


@grids
def test_codes_are_integers_and_scales_have_the_kept_shape(grid):
    codes, scale, _ = scheme_for(grid).codes(torch.randn(4, 3, 5), grid)
    assert (codes.dtype, codes.shape) == (torch.float32, (4, 3, 5))
    assert torch.equal(codes, codes.round())
    assert (scale.dtype, scale.shape) == (torch.float32, arithmetic.kept_shape((4, 3, 5), grid.axis))


@grids
def test_bounds_are_the_outermost_codes(grid):
    x = torch.tensor([[-5.0, 5.0], [-5.0, 5.0]])
    codes = scheme_for(grid).codes(x, grid).codes
    assert scheme_for(grid).bounds(grid) == (codes.min(), codes.max())


@grids
def test_gradient_has_the_dtype_of_the_data(grid):
    x = torch.randn(4, 3, 5).half().requires_grad_()
    scheme_for(grid).fake_quantize(x, grid).float().sum().backward()
    assert x.grad.dtype == torch.float16
    assert x.grad.isfinite().all()


@grids
@pytest.mark.parametrize("value", [0.0, 2.0**-40], ids=["zero", "tiny"])
def test_a_dead_tensor_has_a_positive_scale_and_a_finite_gradient(grid, value):
    x = torch.full((4, 3), value, requires_grad=True)
    scheme_for(grid).fake_quantize(x, grid).sum().backward()
    assert (scheme_for(grid).codes(x, grid).scale > 0).all()
    assert (x.grad.abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["twn", "xnor"])
def test_a_dead_channel_leaves_the_others_alone(name):
    grid = QuantDescriptor(min(SCHEMES[name].num_bits), scheme=name, axis=0)
    scale = scheme_for(grid).codes(torch.tensor([[1.0, -1.0], [0.0, 0.0], [2.0, 2.0]]), grid).scale
    assert scale.flatten().tolist() == [1.0, DEAD_SCALE, 2.0]


@grids
def test_an_empty_tensor_stays_empty(grid):
    assert scheme_for(grid).fake_quantize(torch.empty(0, 3), grid).shape == (0, 3)


@grids
def test_nan_is_not_hidden(grid):
    values = scheme_for(grid).fake_quantize(torch.tensor([[1.0, torch.nan]]), grid)
    assert values.isnan().any()


@pytest.mark.parametrize("grid", {grid.scheme: grid for grid in GRIDS}.values(), ids=str)
def test_one_graph_is_compiled(grid):
    torch.compiler.reset()  # of another axis the compiler would make a symbol
    scheme, x = scheme_for(grid), torch.randn(4, 3)
    compiled = torch.compile(scheme.fake_quantize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid), scheme.fake_quantize(x, grid))


@grids
@given(
    x=hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-1000, 1000).map(lambda n: n / 64)),
    data=st.data(),
)
def test_the_order_of_the_elements_does_not_matter(grid, x, data):
    order = data.draw(st.permutations(range(len(x))))
    plain = grid.replace(axis=None)
    codes, scale, _ = scheme_for(plain).codes(torch.from_numpy(x), plain)
    permuted = scheme_for(plain).codes(torch.from_numpy(x[order]), plain)
    assert torch.equal(permuted.codes, codes[list(order)])
    assert torch.equal(permuted.scale, scale)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.axis == 0], ids=str)
def test_a_channel_is_quantized_as_if_it_were_alone(grid):
    x, scheme = torch.randn(4, 3, 5), scheme_for(grid)
    alone = [scheme.fake_quantize(channel, grid.replace(axis=None)) for channel in x]
    torch.testing.assert_close(scheme.fake_quantize(x, grid), torch.stack(alone))
