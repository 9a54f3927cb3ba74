"""What a folded pair computes, against formulas of the papers and against the pair that is not folded."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fakequant as fq
from fakequant.nn import TensorQuantizer
from fakequant.qat import fold_batchnorm, freeze_batchnorm, unfold_batchnorm

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (5, 4, 7, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (5, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (5, 4, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (5, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (5, 4, 5, 5)),
    "transposed-grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (5, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(7, 6), (12, 7)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def float_pair(kind: str) -> tuple[nn.Sequential, Tensor]:
    """Return a layer and a norm that has been trained, and data; half of the gammas are negative."""
    make, shape = LAYERS[kind]
    norm = NORMS[len(shape)](6, eps=0.1)  # large, so that it matters where it is
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.3, -0.5, 1.0, -1.5, 2.0, -0.9]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
    return nn.Sequential(make(), norm), torch.randn(shape)


def quantized_pair(kind: str, **weight: object) -> tuple[nn.Sequential, Tensor]:
    """Return the same with a quantized layer, whose input is float."""
    pair, x = float_pair(kind)
    axis = 1 if kind.startswith("transposed") else 0
    grid = fq.QuantDescriptor(**{"num_bits": 8, "axis": axis, "narrow_range": True, **weight})
    fq.quantize(pair, fq.preset("int8") + fq.Rule("0", input=None, weight=grid))
    fq.calibrate(pair, [x], progress=False)
    return pair, x


def per_channel(weight: Tensor, layer: nn.Module, factor: np.ndarray) -> np.ndarray:
    """Return the factor of each element of a weight, by what the manuals of torch say of their layout."""
    factors = np.empty(weight.shape)
    outputs = weight.shape[1] if isinstance(layer, nn.modules.conv._ConvTransposeNd) else None
    for index in np.ndindex(*weight.shape):
        if outputs is None:
            factors[index] = factor[index[0]]
        else:
            group = index[0] // (weight.shape[0] // layer.groups)
            factors[index] = factor[group * outputs + index[1]]
    return factors


def gamma_over_sigma(norm: nn.Module) -> np.ndarray:
    return norm.weight.detach().numpy() / np.sqrt(norm.running_var.numpy().astype(np.float64) + norm.eps)


def switch_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()


def loss_of(out: Tensor) -> Tensor:
    """Return a loss that the norm does not make the same for all weights."""
    return out.square().mul(torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()


# The papers.


def straight_through(v: Tensor, amax: Tensor, largest: int) -> Tensor:
    """Round to a grid; the gradient passes unchanged to what is not clipped."""
    codes = v / (amax / largest)
    inside = v * (codes.abs() < largest + 0.5)
    return inside + (codes.round().clamp(-largest, largest) * (amax / largest) - inside).detach()


def of_the_papers(pair: nn.Sequential, x: Tensor, amax: Tensor, in_training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients of arXiv:1712.05877, section 3.2, in float64; statistics of the quantized layer."""
    layer, norm = copy.deepcopy(pair[0]).double(), copy.deepcopy(pair[1]).double()
    x, gamma, beta, weight = x.double(), norm.weight, norm.bias, layer.weight
    sigma = (norm.running_var + norm.eps).sqrt()
    indices = torch.from_numpy(per_channel(weight, layer, np.arange(6.0))).long()
    quantized = straight_through(weight * (gamma / sigma)[indices], amax.double(), 7)
    shape = [1, -1] + [1] * (x.ndim - 2)
    bias = torch.zeros(6, dtype=torch.float64) if layer.bias is None else layer.bias
    layer._parameters["bias"] = None
    del layer.weight
    layer.weight = quantized
    y = layer(x)
    if in_training:
        axes = [axis for axis in range(y.ndim) if axis != 1]
        z = y * (sigma / gamma).reshape(shape) + bias.reshape(shape)
        mean, batch_sigma = z.mean(axes), (z.var(axes, correction=0) + norm.eps).sqrt()
        scale, shift = sigma / batch_sigma, beta - gamma * (mean - bias) / batch_sigma
    else:
        scale, shift = torch.ones_like(sigma), beta - gamma * (norm.running_mean - bias) / sigma
    out = y * scale.reshape(shape) + shift.reshape(shape)
    loss_of(out).backward()
    return out.detach(), {"weight": weight.grad, "gamma": gamma.grad, "beta": beta.grad}


@pytest.mark.parametrize("in_training", [True, False], ids=["training", "frozen"])
@every_layer
def test_output_and_gradients_are_those_of_the_papers(kind, in_training):
    pair, x = float_pair(kind)
    # So coarse that Q(w) is far from w, and some weights are clipped.
    folded = pair[0].weight.detach().numpy() * per_channel(pair[0].weight, pair[0], gamma_over_sigma(pair[1]))
    amax = torch.tensor(0.7 * np.abs(folded).max())
    expected, gradients = of_the_papers(pair, x, amax, in_training)
    grid = fq.QuantDescriptor(4, narrow_range=True)
    fq.quantize(pair, fq.preset("int8") + fq.Rule("0", input=None, weight=grid))
    assert fold_batchnorm(pair, x).folded == {"0": "1"}
    pair[0].weight_quantizer.amax = amax
    if not in_training:
        freeze_batchnorm(pair)
    out = pair.train()(x)
    loss_of(out).backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    found = {"weight": pair[0].weight.grad, "gamma": pair[1].weight.grad, "beta": pair[1].bias.grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


# The ranges.


@every_layer
def test_codes_stay_but_for_their_signs(kind):
    if kind == "transposed-grouped":
        pytest.skip("its channels share ranges")
    pair, x = quantized_pair(kind)
    before = fq.integer_state(pair)["0.weight"].codes
    signs = np.sign(per_channel(pair[0].weight, pair[0], gamma_over_sigma(pair[1])))
    fold_batchnorm(pair, x)
    after = fq.integer_state(pair)["0.weight"].codes
    np.testing.assert_array_equal(after.numpy(), before.numpy() * signs)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_range_of_all_channels_clips_the_same_share(share):
    pair, x = quantized_pair("grouped", axis=None)
    quantizer = pair[0].weight_quantizer
    quantizer.amax = quantizer.amax * share
    fold_batchnorm(pair, x)
    folded = pair[0].weight.detach().numpy() * per_channel(pair[0].weight, pair[0], gamma_over_sigma(pair[1]))
    assert quantizer.amax.item() == pytest.approx(share * np.abs(folded).max(), rel=1e-6)


@every_layer
def test_calibration_after_folding_sees_the_folded_weight(kind):
    pair, x = quantized_pair(kind, axis=None)
    fold_batchnorm(pair, x)
    fq.calibrate(pair, [x], progress=False)
    folded = pair[0].weight.detach().numpy() * per_channel(pair[0].weight, pair[0], gamma_over_sigma(pair[1]))
    assert pair[0].weight_quantizer.amax.item() == pytest.approx(np.abs(folded).max(), rel=1e-6)


def test_ranges_go_back_with_the_weights():
    pair, x = quantized_pair("conv2d")
    before = pair[0].weight_quantizer.amax.clone()
    fold_batchnorm(pair, x)
    unfold_batchnorm(pair)
    torch.testing.assert_close(pair[0].weight_quantizer.amax, before, rtol=3e-7, atol=0)


def test_a_learned_range_stays_the_same_parameter():
    pair, x = quantized_pair("conv2d", learn_amax="lsq")
    before = pair[0].weight_quantizer.amax
    fold_batchnorm(pair, x)
    assert pair[0].weight_quantizer.amax is before


# Without quantization.


@every_layer
def test_training_without_quantizers_is_that_of_the_float_model(kind):
    pair, x = float_pair(kind)
    model = copy.deepcopy(pair)
    fq.quantize(model)
    fold_batchnorm(model, x)
    switch_off(model)
    for one in (pair, model):
        loss_of(one.train()(x)).backward()
    assert torch.equal(model[1].running_var, pair[1].running_var)
    for mine, its in zip(model.parameters(), pair.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


@every_layer
def test_eval_without_quantizers_is_that_of_the_float_model_up_to_rounding(kind):
    pair, x = float_pair(kind)
    pair.eval()
    expected = pair(x).detach()
    fq.quantize(pair)
    fold_batchnorm(pair, x)
    switch_off(pair)
    ulp = np.spacing(np.float32(expected.abs().max()))
    assert float((pair(x) - expected).detach().abs().max()) <= 8 * ulp


@pytest.mark.parametrize("mode", ["train", "eval"])
@every_layer
def test_unfolded_model_computes_what_it_did(kind, mode):
    pair, x = float_pair(kind)
    model = copy.deepcopy(pair)
    fq.quantize(model)
    fold_batchnorm(model, x)
    fq.dequantize(model)
    assert [type(module) for module in model] == [type(module) for module in pair]
    assert torch.equal(getattr(model, mode)()(x), getattr(pair, mode)()(x))


# Channels of which nothing is left.


def test_a_channel_of_gamma_zero_trains_as_in_float():
    pair, x = float_pair("conv2d")
    nn.init.zeros_(pair[1].weight)
    model = copy.deepcopy(pair)
    fq.quantize(model, fq.preset("int8") + fq.Rule("0", input=None))
    fq.calibrate(model, [x], progress=False)
    fold_batchnorm(model, x)
    for one in (pair, model):
        one.train()(x).mul(torch.arange(7.0)).sum().backward()
    torch.testing.assert_close(model[1].weight.grad, pair[1].weight.grad)
    torch.testing.assert_close(model[1].running_var, pair[1].running_var)
    assert torch.equal(model[0].weight.grad, torch.zeros_like(pair[0].weight))


def test_statistics_of_a_channel_that_rounds_to_zero_are_those_of_float():
    pair, x = float_pair("conv2d")
    with torch.no_grad():
        pair[1].weight[2] = 1e-4
    model = copy.deepcopy(pair)
    fq.quantize(model, fq.preset("int8") + fq.Rule("0", input=None, weight=fq.QuantDescriptor(4, narrow_range=True)))
    fold_batchnorm(model, x)
    for one in (pair, model):
        one.train()(x)
    assert model[1].running_var[2] == pytest.approx(pair[1].running_var[2].item(), rel=1e-5)
    assert model[1].running_var[4] != pytest.approx(pair[1].running_var[4].item(), rel=1e-5)


@pytest.mark.parametrize("missing", ["weight", "bias"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_norm_without_gamma_or_beta(missing, mode):
    pair, x = float_pair("conv2d")
    pair[1]._parameters[missing] = None
    expected = getattr(copy.deepcopy(pair), mode)()(x)
    fq.quantize(pair)
    fold_batchnorm(pair, x)
    switch_off(pair)
    torch.testing.assert_close(getattr(pair, mode)()(x), expected, rtol=1e-5, atol=1e-5)


# Precision and compilers.


def test_the_folded_weight_of_a_bfloat16_model_is_of_float32():
    pair, x = quantized_pair("conv2d")
    fold_batchnorm(pair, x)
    pair.to(torch.bfloat16)
    factor = gamma_over_sigma(copy.deepcopy(pair[1]).float())
    folded = pair[0].weight.detach().float().numpy() * per_channel(pair[0].weight, pair[0], factor)
    np.testing.assert_allclose(pair[0].folded_weight().detach().numpy(), folded, rtol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(dtype, mode):
    pair, x = quantized_pair("conv2d")
    fold_batchnorm(pair, x)
    expected = getattr(copy.deepcopy(pair), mode)()(x)
    found = getattr(pair.to(dtype), mode)()(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast_is_near_float32(mode):
    pair, x = quantized_pair("conv2d")
    fold_batchnorm(pair, x)
    expected = getattr(copy.deepcopy(pair), mode)()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(pair, mode)()(x)
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
    assert pair[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    pair, x = quantized_pair("conv2d")
    fold_batchnorm(pair, x)
    plain = copy.deepcopy(pair.train())
    loss_of(checkpoint(pair, x.requires_grad_(), use_reentrant=use_reentrant)).backward()
    loss_of(plain(x)).backward()
    for mine, its in zip(pair.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["training", "frozen"])
def test_compiled_step_is_the_eager_step(is_frozen):
    pair, x = quantized_pair("grouped")
    fold_batchnorm(pair, x)
    if is_frozen:
        freeze_batchnorm(pair)
    pair.train()
    eager = copy.deepcopy(pair)
    loss_of(torch.compile(pair, fullgraph=True, backend="aot_eager")(x)).backward()
    loss_of(eager(x)).backward()
    for mine, its in zip(pair.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
