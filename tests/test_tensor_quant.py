import inspect

import ml_dtypes
import numpy as np
import pytest
import torch

from fakequant import tensor_quant as tensor_quant_module
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.tensor_quant import (
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    tensor_quant,
)

integer_functions = pytest.mark.parametrize("function", [tensor_quant, fake_tensor_quant])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)


def bounds(num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[int, int]:
    high = 2 ** (num_bits - (not unsigned)) - 1
    return (0 if unsigned else -high - (not narrow_range)), high


def expected_codes(x: torch.Tensor, amax: float, low: int, high: int) -> np.ndarray:
    """QuantizeLinear of the ONNX specification, in float32."""
    scale = np.float32(amax) / np.float32(high)
    return np.clip(np.rint(x.to(torch.float32).numpy() / scale), low, high)


def codes_or_values(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def known() -> torch.Tensor:
    """The ten numbers of the ancestor's documentation."""
    torch.manual_seed(12345)
    return torch.rand(10)


def test_fake_tensor_quant_gives_the_known_numbers(known):
    numbers = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
    assert np.round(fake_tensor_quant(known, known.abs().max()).numpy(), 4).tolist() == pytest.approx(numbers, abs=1e-6)


def test_tensor_quant_gives_the_known_codes(known):
    codes, _ = tensor_quant(known, known.abs().max())
    assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


def test_tensor_quant_gives_the_known_scale(known):
    _, scale = tensor_quant(known, known.abs().max())
    assert round(scale.item(), 4) == 128.0057


def test_every_name_of_the_list_is_there():
    assert [name for name in tensor_quant_module.__all__ if not hasattr(tensor_quant_module, name)] == []


@integer_functions
def test_the_arguments_have_the_documented_defaults(function):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert defaults == {"num_bits": 8, "unsigned": False, "narrow_range": True}


def test_the_default_grid_is_narrow():
    assert tensor_quant(torch.tensor([-9.0, 9.0]), 1.0)[0].tolist() == [-127, 127]


@pytest.mark.parametrize("narrow_range", [False, True], ids=["full", "narrow"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("num_bits", range(2, 17))
def test_codes_are_those_of_the_specification(num_bits, unsigned, narrow_range):
    x = torch.randn(2000) * 2
    x = x.abs() if unsigned else x
    low, high = bounds(num_bits, unsigned, narrow_range)
    codes, scale = tensor_quant(x, 1.7, num_bits, unsigned, narrow_range)
    assert np.array_equal(codes.numpy(), expected_codes(x, 1.7, low, high))
    assert scale.item() == pytest.approx(high / 1.7, rel=1e-6)


@pytest.mark.parametrize("narrow_range", [False, True], ids=["full", "narrow"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("num_bits", range(2, 17))
def test_values_are_codes_times_the_step(num_bits, unsigned, narrow_range):
    x = torch.randn(2000) * 2
    x = x.abs() if unsigned else x
    low, high = bounds(num_bits, unsigned, narrow_range)
    expected = expected_codes(x, 1.7, low, high) * (np.float32(1.7) / np.float32(high))
    assert np.array_equal(fake_tensor_quant(x, 1.7, num_bits, unsigned, narrow_range).numpy(), expected)


@dtypes
def test_codes_and_scale_have_the_dtype_of_the_inputs(dtype):
    codes, scale = tensor_quant(torch.tensor([0.5, -1.0], dtype=dtype), torch.tensor(1.0))
    assert (codes.dtype, scale.dtype) == (dtype, dtype)


@dtypes
def test_values_are_computed_in_float32_and_rounded_once(dtype):
    x = torch.randn(2000, dtype=torch.float64).to(dtype)
    step = np.float32(1.7) / np.float32(127)
    expected = torch.from_numpy(expected_codes(x, 1.7, -127, 127) * step).to(dtype)
    assert torch.equal(fake_tensor_quant(x, 1.7), expected)


def test_amax_broadcasts():
    x = torch.tensor([[1.0, -9.0], [1.0, -9.0]])
    codes, scale = tensor_quant(x, torch.tensor([[127.0], [1.27]]))
    assert codes.tolist() == [[1, -9], [100, -127]]
    assert scale.shape == (2, 1)


@pytest.mark.parametrize("amax", [1.27, torch.tensor(1.27), np.float32(1.27), [1.27]], ids=lambda v: type(v).__name__)
@integer_functions
def test_amax_may_be_a_number_a_list_an_array_or_a_tensor(function, amax):
    x = torch.tensor([0.5, -2.0])
    result, expected = function(x, amax), function(x, torch.tensor(1.27))
    assert torch.equal(codes_or_values(result), codes_or_values(expected))


@integer_functions
def test_a_dead_range_gives_finite_numbers(function):
    assert codes_or_values(function(torch.zeros(4), torch.tensor(0.0))).tolist() == [0.0] * 4


@integer_functions
def test_an_empty_tensor_stays_empty(function):
    assert codes_or_values(function(torch.empty(0), 1.0, unsigned=True)).shape == (0,)


@integer_functions
def test_negative_inputs_of_an_unsigned_grid_are_refused(function):
    with pytest.raises(InvalidTypeError, match=r"Negative values encountered in unsigned quantization: minimum -0.25"):
        function(torch.tensor([1.0, -0.25]), 1.0, unsigned=True)


@pytest.mark.parametrize("amax", [-1.0, torch.nan, torch.inf, [1.0, -1.0]], ids=str)
@integer_functions
def test_amax_that_is_no_range_is_refused(function, amax):
    with pytest.raises(InvalidValueError, match="amax: expected finite values >= 0, got"):
        function(torch.ones(2), amax)


@integer_functions
def test_integer_inputs_are_refused(function):
    with pytest.raises(InvalidTypeError, match=r"inputs: expected a floating point tensor, got torch.int64"):
        function(torch.arange(3), 1.0)


@pytest.mark.parametrize(
    ("num_bits", "message"),
    [
        (1, r"num_bits: expected 2 to 16 or one of .*, got 1"),
        (17, r"num_bits: expected 2 to 16 or one of .*, got 17"),
        ((4, 3), r"num_bits: expected an int here, got \(4, 3\); use scaled_e4m3"),
    ],
    ids=str,
)
@integer_functions
def test_num_bits_out_of_range_is_refused(function, num_bits, message):
    with pytest.raises(InvalidValueError, match=message):
        function(torch.ones(2), 1.0, num_bits)


def test_a_scale_too_large_for_float16_is_refused():
    with pytest.raises(InvalidValueError, match=r"amax: expected at least 0.00194 for float16 inputs, got 0.001"):
        tensor_quant(torch.ones(2).half(), 0.001)


def test_a_scale_too_large_for_float16_is_fine_in_bfloat16():
    assert tensor_quant(torch.ones(2).bfloat16(), 0.001)[1].item() == pytest.approx(127_000, rel=2**-8)


def test_fake_tensor_quant_needs_no_scale_in_float16():
    x = torch.tensor([0.001, 0.0005]).half()
    expected = expected_codes(x, 0.001, -127, 127) * (np.float32(0.001) / np.float32(127))
    assert torch.equal(fake_tensor_quant(x, 0.001), torch.from_numpy(expected).half())


@pytest.mark.parametrize(
    "function", [lambda x: tensor_quant(x, 1.0)[0], lambda x: fake_tensor_quant(x, 1.0)], ids=["codes", "values"]
)
def test_gradient_passes_within_amax(function):
    x = torch.tensor([-1.1, -1.0, 0.3, 1.0, 1.1], requires_grad=True)
    function(x).backward(torch.full((5,), 2.0))
    assert x.grad.tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "function", [lambda x, a: tensor_quant(x, a)[0], fake_tensor_quant, scaled_e4m3], ids=["codes", "values", "e4m3"]
)
def test_amax_gets_no_gradient(function):
    x, amax = torch.randn(5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    function(x, amax).sum().backward()
    assert amax.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(
    ("least", "most", "num_bits"), [(-1.0, 1.0, 8), (0.0, 6.0, 8), (-0.3, 2.9, 4), (-5.0, -1.0, 8), (2.0, 3.0, 2)]
)
def test_affine_values_are_those_of_the_formula(least, most, num_bits):
    x = torch.linspace(least - 1, most + 1, 1001)
    low, high = bounds(num_bits, False, False)
    step = (np.float32(most) - np.float32(least)) / np.float32(high - low)
    zero = np.rint(np.float32(least) / step) - np.float32(low)
    expected = (np.clip(np.rint(x.numpy() / step) - zero, low, high) + zero) * step
    result = fake_affine_tensor_quant(x, torch.tensor(least), torch.tensor(most), num_bits)
    assert np.array_equal(result.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("num_bits", [2, 8])
def test_affine_has_two_to_the_bits_levels(num_bits):
    x = torch.linspace(-2, 5, 5000)
    assert len(fake_affine_tensor_quant(x, -1.0, 4.0, num_bits).unique()) == 2**num_bits


@dtypes
def test_affine_keeps_the_dtype(dtype):
    assert fake_affine_tensor_quant(torch.rand(3).to(dtype), 0.0, 1.0).dtype == dtype


def test_affine_gradient_passes_within_the_range():
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], requires_grad=True)
    fake_affine_tensor_quant(x, 0.0, 1.0).backward(torch.full((5,), 2.0))
    assert x.grad.tolist() == [0.0, 2.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("least", "most"),
    [(1.0, 1.0), (2.0, 1.0), (0.0, 1e-45), (torch.nan, 1.0), (0.0, torch.inf), (-3e38, 3e38)],
)
def test_an_affine_range_that_is_empty_or_not_finite_is_refused(least, most):
    with pytest.raises(InvalidValueError, match=r"range: expected finite min_range < max_range, got "):
        fake_affine_tensor_quant(torch.rand(3), least, most)


def test_an_affine_range_per_channel_is_refused():
    with pytest.raises(InvalidValueError, match=r"range: expected two scalars, got shapes \(3,\) and \(\)"):
        fake_affine_tensor_quant(torch.rand(3), torch.zeros(3), 1.0)


@pytest.mark.parametrize("num_bits", [(4, 3), 1, 17], ids=str)
def test_affine_num_bits_out_of_range_is_refused(num_bits):
    with pytest.raises(InvalidValueError, match="num_bits: expected"):
        fake_affine_tensor_quant(torch.rand(3), 0.0, 1.0, num_bits)


def test_affine_integer_inputs_are_refused():
    with pytest.raises(InvalidTypeError, match=r"inputs: expected a floating point tensor, got torch.int64"):
        fake_affine_tensor_quant(torch.arange(3), 0.0, 1.0)


@pytest.mark.parametrize(("amax", "value"), [(None, 1.75), (2.0, 1.8571)], ids=str)
def test_e4m3_gives_the_known_numbers(amax, value):
    assert round(scaled_e4m3(torch.tensor(1.8), amax).item(), 4) == value


@pytest.mark.parametrize("x", [449.0, 1e9, torch.inf])
def test_e4m3_saturates_without_amax(x):
    assert scaled_e4m3(torch.tensor([x, -x])).tolist() == [448.0, -448.0]


def test_e4m3_scales_each_channel():
    x, amax = torch.randn(3, 1000), torch.tensor([[0.5], [2.0], [4.0]])
    scale = amax.numpy() / np.float32(448)
    scaled = np.clip(x.numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(scaled_e4m3(x, amax).numpy(), scaled.astype(np.float32) * scale)


def test_e4m3_gradient_passes_within_amax():
    x = torch.tensor([-1.01, -1.0, 0.5, 1.0, 1.01], requires_grad=True)
    scaled_e4m3(x, 1.0).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("exponent", "mantissa"), [(5, 2), (3, 4)])
def test_other_float_formats_are_refused(exponent, mantissa):
    with pytest.raises(InvalidValueError, match=rf"E, M: expected \(4, 3\), got \({exponent}, {mantissa}\)"):
        scaled_e4m3(torch.ones(1), E=exponent, M=mantissa)


@pytest.mark.parametrize("amax", [-1.0, torch.nan], ids=str)
def test_e4m3_amax_that_is_no_range_is_refused(amax):
    with pytest.raises(InvalidValueError, match="amax: expected finite values >= 0"):
        scaled_e4m3(torch.ones(1), amax)


def test_e4m3_integer_inputs_are_refused():
    with pytest.raises(InvalidTypeError, match=r"inputs: expected a floating point tensor, got torch.int64"):
        scaled_e4m3(torch.arange(3))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 10), (torch.float16, 13)], ids=str)
def test_codes_that_the_dtype_cannot_hold_are_refused(dtype, bits):
    with pytest.raises(InvalidValueError, match=r"num_bits: expected codes up to \d+, which torch\.\w+ holds exactly"):
        tensor_quant(torch.ones(2).to(dtype), 1.0, num_bits=bits)
