"""Fold a BatchNormalization into the integer weights of the convolution in front of it, exactly.

With k = gamma / sqrt(var + eps), per output channel::

    BN(conv(x, W) + b) = conv(x, k W) + (b - mean) k + beta

W is stored as codes q and scales s. Since k W = q (k s), the codes stay as they are and
the scales become |k| s; where k is negative the codes change their sign, which
[-127, 127] allows. Where k is 0 the channel's codes become 0 and its scale DEAD_SCALE.
No weight is rounded a second time: what was calibrated or trained is what is stored.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fakequant import arithmetic
from fakequant.export.graph import along_axis, axis_of, constant_of, new_initializer, only_consumer, produced_by

_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}


class FoldBatchNorm(ir.passes.InPlacePass):
    """Folds Conv -> BatchNormalization; ``skipped`` says for each one that stayed, why."""

    def __init__(self) -> None:
        """Start with no refusals."""
        super().__init__()
        self.skipped: dict[str, str] = {}
        self.folded = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold what can be folded."""
        for node in list(model.graph):
            conv = node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
            if conv is None or conv.op_type not in _CHANNEL_AXIS:
                continue
            refusal = self._fold(model.graph, conv, node)
            if refusal:
                self.skipped[node.name or node.outputs[0].name or "?"] = refusal
            else:
                self.folded += 1
        return ir.passes.PassResult(model, modified=self.folded > 0)

    def _fold(self, graph: ir.Graph, conv: ir.Node, norm: ir.Node) -> str | None:
        dequantize = produced_by(conv.inputs[1], "DequantizeLinear")
        if only_consumer(conv.outputs[0], "BatchNormalization") is None:
            return "the convolution's output has another reader"
        if dequantize is None or only_consumer(dequantize.outputs[0], conv.op_type) is None:
            return "the weight is not quantized, or shared with another layer"
        codes, scale = constant_of(dequantize.inputs[0]), constant_of(dequantize.inputs[1])
        parameters = [constant_of(value) for value in norm.inputs[1:5]]
        bias = constant_of(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
        if codes is None or scale is None or codes.dtype.kind != "i":
            return "the weight is not stored as signed integers"
        if any(p is None for p in parameters):
            return "scale, shift or statistics are not constant"
        if len(conv.inputs) > 2 and conv.inputs[2] is not None and bias is None:
            return "the bias is not constant"
        channel = _CHANNEL_AXIS[conv.op_type]
        axis = axis_of(dequantize, scale)
        gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
        in_blocks = "block_size" in dequantize.attributes
        if in_blocks or axis not in (None, channel) or codes.shape[channel] != gamma.size:
            return "ranges along another axis, or shared by channel groups"
        if codes.min() < -np.iinfo(codes.dtype.name).max:
            return "a code has no negative in its type"
        factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
        new_codes, new_scale = _scaled(codes, scale, factor, channel)
        new_bias = ((0.0 if bias is None else bias.astype(np.float64)) - mean) * factor + beta
        _replace(graph, dequantize, new_codes, new_scale, channel)
        stem = (norm.inputs[1].name or "batchnorm").removesuffix(".weight") if norm.inputs[1] else "batchnorm"
        conv.resize_inputs(3)
        conv.replace_input_with(2, new_initializer(graph, f"{stem}.folded_bias", new_bias.astype(np.float32)))
        output = conv.outputs[0]
        ir.convenience.replace_all_uses_with(norm.outputs[0], output, replace_graph_outputs=True)
        graph.remove(norm, safe=True)
        if output.is_graph_output():
            output.name = norm.outputs[0].name
        return None


def _scaled(
    codes: NDArray[np.generic], scale: NDArray[np.generic], factor: NDArray[np.float64], channel: int
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Return codes and per-channel scales of the weight times factor."""
    new_scale = (np.abs(factor) * scale.astype(np.float64)).astype(np.float32)
    dead = new_scale < np.finfo(np.float32).tiny
    new_scale[dead] = arithmetic.DEAD_SCALE
    sign = np.where(dead, 0, np.sign(factor)).astype(codes.dtype)
    return np.multiply(codes, along_axis(sign, channel, codes.ndim)), new_scale


def _replace(graph: ir.Graph, node: ir.Node, codes: NDArray[np.generic], scale: NDArray[np.float32], axis: int) -> None:
    stored, old_scale = node.inputs[0], node.inputs[1]
    assert stored is not None
    assert old_scale is not None
    zero_point = np.zeros(scale.shape, dtype=codes.dtype)
    node.replace_input_with(0, new_initializer(graph, f"{stored.name}.folded", codes))
    node.replace_input_with(1, new_initializer(graph, f"{old_scale.name}.folded", scale))
    node.replace_input_with(2, new_initializer(graph, f"{old_scale.name}.zero_point", zero_point))
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
