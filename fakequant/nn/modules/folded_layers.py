"""Layers that are trained with the batch norm behind them folded into their weight.

Jacob et al. 2018 (arXiv:1712.05877), section 3.2, and Krishnamoorthi 2018 (arXiv:1806.08342),
section 3.2.2. With f = gamma / sqrt(running_var + eps), one factor per output channel, the
weight that is quantized is f w, which is what will be deployed. Where the norm does not train,
the layer computes the norm as well, and the norm returns its input::

    conv(x, Q(f w)) + (b - mean) f + beta

Where it trains, the layer divides by f again, and the norm is torch's own::

    norm(conv(x, Q(f w) / f) + b) = sigma' / sigma conv(x, Q(f w)) + beta - (mean - b) gamma / sigma

with the batch's mean and sigma, and sigma' = sqrt(running_var + eps): the papers' correction, for
the price of one convolution and no more memory, because weights are divided instead of outputs.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from fakequant.arithmetic import Axis, kept_shape, range_of
from fakequant.errors import InvalidValueError
from fakequant.nn.forms import register_forms
from fakequant.nn.modes import is_repeated
from fakequant.nn.modules.batchnorm import FOLDED, FoldedNorm
from fakequant.nn.modules.channel_factors import Divide, Multiply, divisible
from fakequant.nn.modules.conv import QuantConv1d, QuantConv2d, QuantConv3d
from fakequant.nn.modules.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from fakequant.nn.modules.linear import QuantLinear
from fakequant.nn.modules.quant_module import QuantProduct
from fakequant.nn.modules.tensor_quantizer import TensorQuantizer
from fakequant.nn.moves import Moves
from fakequant.nn.sharding import is_sharded, whole
from fakequant.nn.snapshot import snapshot


class FoldedLayer(QuantProduct):
    """A quantized layer that a batch norm is folded into. Parameters and buffers of both stay what and where they are.

    In training, a channel of which the grid leaves nothing, such as one with gamma = 0, has its float
    weight: its batch statistics would be those of zeros, and its sigma would fall with every step.
    """

    _norm: _BatchNorm
    _variance: Tensor
    _moves: Moves

    @property
    def norm(self) -> _BatchNorm:
        """The batch norm, which has its own place in the model."""
        return self._norm

    def folded_weight(self) -> Tensor:
        """Return the weight times the factor of the batch norm, in float32 if the weight has fewer bits."""
        return self._folded(self._factor())

    def bias_in_eval(self) -> Tensor:
        """Return what is left of the batch norm beside the weight."""
        norm, factor = self._norm, self._factor()
        assert norm.running_mean is not None
        mean = norm.running_mean.to(factor.dtype)
        bias = (-mean if self.bias is None else self.bias - mean) * factor
        return (bias if norm.bias is None else bias + norm.bias).to(self.weight.dtype)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return what it multiplies with and what it adds; which, is for the mode of the batch norm to say."""
        if not self._norm.training:
            return self._weight_quantizer(self.folded_weight()).to(self.weight.dtype), self.bias_in_eval()
        factor = divisible(self._factor())
        folded = self._folded(factor)
        quantized = self._weight_quantizer(folded)
        if quantized is folded:  # the quantizer is off
            return self.weight, self.bias
        grouped = (tensor.reshape(self._grouped_shape()) for tensor in (quantized, folded.detach()))
        divided = Divide.apply(*grouped, self._along_channels(factor), self._channel_axes)  # type: ignore[no-untyped-call]
        self._moves.end_with(divided)
        return divided.reshape(self.weight.shape).to(self.weight.dtype), self.bias

    def _factor(self) -> Tensor:
        """Return gamma / sigma, one number a channel."""
        norm = self._norm
        variance = self._variance_read() if norm.training else norm.running_var
        assert variance is not None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        factor = (variance.to(dtype) + norm.eps).rsqrt()
        return factor if norm.weight is None else factor * self._gathered(norm.weight).to(dtype)

    def _variance_read(self) -> Tensor:
        """Return the running variance before the norm updates it, also where a checkpoint runs the layer again."""
        if torch.compiler.is_compiling():
            assert self._norm.running_var is not None
            return snapshot(self._norm.running_var)
        if is_repeated():
            self._moves.check(str(self._norm))
        else:
            self._moves.add()
            self._variance = self._norm.running_var.clone()  # type: ignore[union-attr]
        return self._variance

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what ran before is no part of a step of training."""
        self._moves = Moves()
        return super().train(mode)

    def _gathered(self, parameter: Tensor) -> Tensor:
        """Return a parameter as a whole. With gradient only a forward of ``fully_shard`` can gather it."""
        if is_sharded(parameter) and torch.is_grad_enabled():
            raise InvalidValueError(
                f"{self._norm}: expected a batch norm in the same group of fully_shard as the layer that it is folded "
                "into, got another. Shard a block that has both, or both together: fully_shard([layer, norm])"
            )
        return whole(parameter)

    def _folded(self, factor: Tensor) -> Tensor:
        grouped = self._gathered(self.weight).reshape(self._grouped_shape())
        folded: Tensor = Multiply.apply(grouped, self._along_channels(factor), self._channel_axes)  # type: ignore[no-untyped-call]
        return folded.reshape(self.weight.shape)

    def _along_channels(self, factor: Tensor) -> Tensor:
        """Return a number a channel such that it broadcasts to a grouped weight."""
        return factor.reshape(kept_shape(self._grouped_shape(), self._channel_axes))

    _channel_axes: ClassVar[Axis] = 0
    """The axes of a grouped weight that are the output channels."""

    def _grouped_shape(self) -> tuple[int, ...]:
        """Return the shape in which a weight has its output channels on axes of their own."""
        return tuple(self.weight.shape)


class _FoldedConvTranspose(FoldedLayer, _ConvTransposeNd):
    _channel_axes = (0, 2)

    def _grouped_shape(self) -> tuple[int, ...]:
        inputs, *rest = self.weight.shape
        return self.groups, inputs // self.groups, *rest


class FoldedConv1d(FoldedLayer, QuantConv1d):
    """QuantConv1d with the batch norm behind it."""


class FoldedConv2d(FoldedLayer, QuantConv2d):
    """QuantConv2d with the batch norm behind it."""


class FoldedConv3d(FoldedLayer, QuantConv3d):
    """QuantConv3d with the batch norm behind it."""


class FoldedConvTranspose1d(_FoldedConvTranspose, QuantConvTranspose1d):
    """QuantConvTranspose1d with the batch norm behind it."""


class FoldedConvTranspose2d(_FoldedConvTranspose, QuantConvTranspose2d):
    """QuantConvTranspose2d with the batch norm behind it."""


class FoldedConvTranspose3d(_FoldedConvTranspose, QuantConvTranspose3d):
    """QuantConvTranspose3d with the batch norm behind it."""


class FoldedLinear(FoldedLayer, QuantLinear):
    """QuantLinear with the batch norm behind it."""


FOLDED_LAYERS: dict[type[QuantProduct], type[FoldedLayer]] = {
    QuantConv1d: FoldedConv1d,
    QuantConv2d: FoldedConv2d,
    QuantConv3d: FoldedConv3d,
    QuantConvTranspose1d: FoldedConvTranspose1d,
    QuantConvTranspose2d: FoldedConvTranspose2d,
    QuantConvTranspose3d: FoldedConvTranspose3d,
    QuantLinear: FoldedLinear,
}
"""What a layer becomes when a batch norm is folded into it."""

UNFOLDED: dict[type[nn.Module], type[nn.Module]] = {
    folded: plain for table in (FOLDED_LAYERS, FOLDED) for plain, folded in table.items()
}
"""What a folded layer or norm was before."""

register_forms({layer.float_class: folded for layer, folded in FOLDED_LAYERS.items()})


def fold(layer: QuantProduct, norm: _BatchNorm) -> None:
    """Fold a batch norm into the layer in front of it, in place; a range of the weight follows the weight.

    Args:
        layer: of a class of FOLDED_LAYERS.
        norm: of a class of FOLDED, with running statistics, read by nobody else.
    """
    folded = FOLDED_LAYERS[type(layer)]
    layer.__class__ = folded
    norm.__class__ = FOLDED[type(norm)]  # type: ignore[assignment]
    object.__setattr__(layer, "_norm", norm)  # not as a child: it is one already, elsewhere
    vars(layer)["_moves"] = Moves()
    _move_range(layer.weight_quantizer, layer.weight, folded.folded_weight(layer))  # type: ignore[arg-type]


def unfold(module: nn.Module) -> None:
    """Give a folded layer or a folded norm the class that it had, and leave other modules alone."""
    if isinstance(module, FoldedNorm):
        module.__class__ = UNFOLDED[type(module)]  # type: ignore[assignment]
    elif isinstance(module, FoldedLayer):
        before = module.folded_weight()
        module.__class__ = UNFOLDED[type(module)]  # type: ignore[assignment]
        del vars(module)["_norm"]
        vars(module).pop("_variance", None)
        vars(module).pop("_moves", None)
        _move_range(module.weight_quantizer, before, module.weight)


def folded_pairs(model: nn.Module) -> dict[str, str]:
    """Return {name of a folded layer: name of its norm}.

    Raises:
        InvalidValueError: a layer whose norm is no part of the model, or a norm without its layer: one of
            them was replaced, and nobody normalizes.
    """
    norms: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, FoldedNorm)}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FoldedLayer)}
    if lost := [name for name, layer in layers.items() if layer.norm not in norms]:
        raise InvalidValueError(f"{', '.join(lost)}: expected the batch norm that was folded into it, got another")
    held: set[nn.Module] = {layer.norm for layer in layers.values()}
    if lost := [name for norm, name in norms.items() if norm not in held]:
        raise InvalidValueError(f"{', '.join(lost)}: expected the layer that it was folded into, got another")
    return {name: norms[layer.norm] for name, layer in layers.items()}


@torch.no_grad()
def _move_range(quantizer: TensorQuantizer, before: Tensor, after: Tensor) -> None:
    """Give a quantizer of one weight the range of another: clipped by the same share, or all of it on an affine grid.

    With a range for each output channel this is the old one times the factor.
    """
    amax, _ = quantizer.ends
    if amax is None or not quantizer.is_to_calibrate:
        return
    found, amin = range_of(quantizer.descriptor, after)
    if amin is None:
        whole, _ = range_of(quantizer.descriptor, before)
        share = amax.reshape(whole.shape if amax.numel() == whole.numel() else amax.shape) / whole
        found = torch.where(whole > 0, share * found, found)
    quantizer.replace_range(found, amin)
