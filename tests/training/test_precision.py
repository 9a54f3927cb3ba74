"""Precisions of one quantizer: computed in float32, of whatever dtype, scaled gradients, memory formats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fakequant import QuantDescriptor
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers

FAMILIES = {
    "uniform": QuantDescriptor(),
    "channels": QuantDescriptor(axis=1),
    "affine": QuantDescriptor(affine=True, unsigned=True),
    "float8": QuantDescriptor((4, 3)),
    "float4": QuantDescriptor((2, 1), axis=1),
    "lsq": QuantDescriptor(learn_amax="lsq"),
    "lsq channels": QuantDescriptor(learn_amax="lsq", axis=1),
    "lsq+": QuantDescriptor(learn_amax="lsq+", affine=True, unsigned=True),
    "pact": QuantDescriptor(learn_amax="pact"),
    "blocks": QuantDescriptor(4, block_size=2),
    "dynamic": QuantDescriptor(dynamic=True),
    "tokens": QuantDescriptor(dynamic=True, axis="tokens"),
    "mxfp8": QuantDescriptor((4, 3), block_size=2, scale_format="e8m0", dynamic=True),
    "twn": QuantDescriptor(2, scheme="twn", axis=0),
    "dorefa": QuantDescriptor(3, scheme="dorefa"),
    "bnn": QuantDescriptor(1, scheme="bnn"),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_family = pytest.mark.parametrize("grid", FAMILIES.values(), ids=FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def images() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def calibrated(grid: QuantDescriptor) -> TensorQuantizer:
    quantizer = TensorQuantizer(grid)
    if quantizer.needs_range:
        quantizer.enable_calib()
        quantizer(0.8 * images())
        quantizer.disable_calib()
        quantizer.load_calib_amax()
    return quantizer


def with_gradients(quantizer: TensorQuantizer, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the output and the gradients of its sum, of x and of the range."""
    leaf = x.detach().requires_grad_()
    quantizer.zero_grad()
    output = quantizer(leaf)
    output.sum().backward()
    return output.detach(), leaf.grad, [parameter.grad for parameter in quantizer.parameters()]


@every_dtype
@every_family
def test_values_and_gradients_are_those_of_float32_in_the_inputs_dtype(grid, dtype):
    quantizer, x = calibrated(grid), images().to(dtype)
    output, gradient, of_range = with_gradients(quantizer, x)
    expected, expected_gradient, expected_of_range = with_gradients(quantizer, x.float())
    assert torch.equal(output, expected.to(dtype))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))
    assert [value.dtype for value in of_range] == [torch.float32] * len(of_range)
    torch.testing.assert_close(of_range, expected_of_range)


@given(
    dtype=st.sampled_from(DTYPES[:3]),
    amax=st.floats(2.0**-20, 2.0**20, width=32),
    values=st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=20),
    num_bits=st.integers(2, 8),
)
def test_values_are_numpys_in_float32(dtype, amax, values, num_bits):
    x, high = torch.tensor(values).to(dtype), 2 ** (num_bits - 1) - 1
    step = np.float32(amax) / np.float32(high)
    codes = np.clip(np.rint(x.float().numpy() / step), -high - 1, high)
    expected = torch.from_numpy(codes * step).to(dtype)
    assert torch.equal(TensorQuantizer(QuantDescriptor(num_bits, amax=amax))(x), expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@every_family
def test_a_cast_model_keeps_its_ranges(grid, cast):
    quantizer = calibrated(grid)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    getattr(nn.Sequential(quantizer, nn.Conv2d(4, 4, 1)), cast)()
    after = quantizer.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == torch.float32 for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_channels_last_comes_out_as_it_went_in(grid, dtype):
    quantizer, x = calibrated(grid), images().to(dtype).contiguous(memory_format=torch.channels_last)
    output, gradient, _ = with_gradients(quantizer, x)
    plain, plain_gradient, _ = with_gradients(quantizer, x.contiguous())
    assert torch.equal(output, plain)
    torch.testing.assert_close(gradient, plain_gradient)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_channels_last_model_stays_so_between_its_layers(networks, learned):
    model = networks.quantized("residual", learned=learned).to(memory_format=torch.channels_last)
    seen = []
    for _, quantizer in named_quantizers(model):
        quantizer.register_forward_hook(lambda _module, args, output: seen.append((args[0].stride(), output.stride())))
    x, y = networks.data("residual")
    networks.train(model, (x.contiguous(memory_format=torch.channels_last), y), steps=1)
    assert seen
    assert all(before == after for before, after in seen)


# Gradient scaling


@pytest.fixture
def scaled(networks):
    """A model with learned ranges in autocast float16, its optimizer, and a scaler."""
    model = networks.quantized("residual", learned=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)


def scaled_step(networks, scaled, factor: float = 1.0) -> float:
    model, optimizer, scaler = scaled
    x, y = networks.data("residual")
    optimizer.zero_grad()
    loss = F.cross_entropy(networks.forward(model, x, "autocast float16").float(), y)
    scaler.scale(loss * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


def test_scaled_gradients_train(networks, scaled):
    losses = [scaled_step(networks, scaled) for _ in range(6)]
    assert losses[-1] < losses[0]


def learned_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("_amax") and p.requires_grad}


def test_a_step_of_infinite_gradients_leaves_every_range(networks, scaled):
    model, _, scaler = scaled
    before = {name: value.detach().clone() for name, value in learned_ranges(model).items()}
    scaled_step(networks, scaled, factor=float("inf"))
    assert before
    assert all(torch.equal(before[name], value) for name, value in learned_ranges(model).items())
    assert scaler.get_scale() == 2.0**9
