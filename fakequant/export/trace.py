"""From a quantized torch model to an ONNX graph in which each call of a quantizer is one node.

While torch traces, every quantizer is one op that stands for it, ``fakequant::Quantizer`` with the
quantizer's name, instead of a dozen for its arithmetic: a third of the time, and nothing to
recognize afterwards. ExpandQuantizers makes Q and DQ of it.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn
from torch.nn.modules import transformer

from fakequant.call_sites import TRANSLATIONS
from fakequant.errors import ExportError
from fakequant.export.graph import DOMAIN, MARKER
from fakequant.export.recurrent_ops import TRANSLATION
from fakequant.export.tensor_inputs import check_dynamic, tensor_inputs
from fakequant.export.torchscript import trace_torchscript, warn_of_sizes
from fakequant.export.trace_recurrent import recurrent_layers
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers

_LIBRARY = torch.library.Library("fakequant", "DEF")
# CONSERVATIVE: TorchScript must not make one of two equal calls; what validates a file counts calls.
_LIBRARY.define("quantizer(Tensor x, str name) -> Tensor", "CONSERVATIVE")
_LIBRARY.impl("quantizer", lambda x, name: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("quantizer", lambda x, name: torch.empty_like(x), "Meta")

_FIRST_OF_TORCH_EXPORT = 18
"""The first opset that torch's torch.export based exporter writes; its TorchScript exporter writes those before."""

_OLD_EXPORTER = ". Files below opset 18 are from torch's TorchScript exporter, which register_op does not reach"

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_MARKER = Op(
    Opset(DOMAIN, 1),
    MARKER,
    onnx.defs.OpSchema(
        MARKER,
        DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter("x", "T")],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", _FLOATS, "what can be quantized")],
        attributes=[onnx.defs.OpSchema.Attribute("name", onnx.defs.OpSchema.AttrType.STRING, required=True)],
    ),
)


def _marker(x: Any, name: str) -> Any:
    return _MARKER(x, name=name)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    quantizers: Mapping[str, TensorQuantizer],
    *,
    opset: int,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """Return the graph of a model in eval mode, as torch exports it, with a marker for each call of a quantizer.

    Args:
        model: its quantizers are as they should be exported.
        args: example inputs.
        quantizers: by name, those to be marked; others must be the identity.
        opset: of the graph.
        dynamic_shapes: as for torch.export.
        input_names: of the graph.
        output_names: of the graph.

    Raises:
        ExportError: torch cannot export the model.
    """
    inputs = tensor_inputs(model, args, dynamic_shapes)
    if len(input_names or ()) > len(inputs):
        known = ", ".join(value.name for value in inputs)
        raise ExportError(f"input_names: expected at most {len(inputs)} ({known}), got {len(input_names or ())}")
    names = input_names, output_names
    # torch warns about its own internals here; what matters to the user is checked by export_onnx.
    with (
        evaluating(model),
        _marked(model, quantizers),
        _masks_taken_as_they_are(),
        recurrent_layers(model, args),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            if opset < _FIRST_OF_TORCH_EXPORT:
                graph, fixed = trace_torchscript(model, args, inputs, opset, *names), frozenset[str]()
            else:
                graph, fixed = _trace_torch_export(model, args, dynamic_shapes, opset, *names)
        except ExportError:
            raise
        except Exception as error:  # torch raises its own types, unrelated to each other
            if isinstance(error.__cause__, ExportError):
                raise ExportError(str(error.__cause__)) from error
            hint = "" if opset >= _FIRST_OF_TORCH_EXPORT else _OLD_EXPORTER
            raise ExportError(f"torch.onnx.export failed for {type(model).__name__}: {error}{hint}") from error
    if opset < _FIRST_OF_TORCH_EXPORT and any(value.dynamic for value in inputs):
        warn_of_sizes(caught)
    check_dynamic(graph.graph, inputs, fixed)
    return graph


def _trace_torch_export(
    model: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> tuple[ir.Model, frozenset[str]]:
    """Return the graph, and the names of sizes in it that are no variables: torch.export found one value for them."""
    program = torch.onnx.export(
        model,
        args,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=dynamic_shapes,  # type: ignore[arg-type]
        input_names=input_names,
        output_names=output_names,
        custom_translation_table={**TRANSLATIONS, **TRANSLATION, torch.ops.fakequant.quantizer.default: _marker},
        optimize=False,
        verbose=False,
    )
    assert program is not None
    assert program.exported_program is not None
    ranges = program.exported_program.range_constraints
    return program.model, frozenset(str(size) for size, values in ranges.items() if values.lower == values.upper)


@contextlib.contextmanager
def _marked(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> Iterator[None]:
    """Let the calls of quantizers be traced as markers for a with block.

    Their ranges are no buffers meanwhile: torch.export would make an input of each, and take a third longer.
    """
    every = [quantizer for _, quantizer in named_quantizers(model)]
    stores = [(q, q._parameters if key in q._parameters else q._buffers, key) for q in every for key in q.range_keys]
    ends: list[Any] = [store.pop(key) for _, store, key in stores]
    for (quantizer, _, key), end in zip(stores, ends, strict=True):
        vars(quantizer)[key] = end.detach()  # TorchScript takes no constant that requires a gradient
    for name, quantizer in quantizers.items():
        quantizer.forward = functools.partial(_mark, quantizer, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.forward
        for (quantizer, store, key), end in zip(stores, ends, strict=True):
            del vars(quantizer)[key]
            store[key] = end


@contextlib.contextmanager
def _masks_taken_as_they_are() -> Iterator[None]:
    """Keep torch's transformers from looking into their masks for a with block.

    They look whether a mask is the causal one, only to choose a kernel, and torch.export cannot follow.
    """
    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


def _mark(quantizer: TensorQuantizer, name: str, inputs: Tensor) -> Tensor:
    marked: Tensor = torch.ops.fakequant.quantizer(quantizer.checked(inputs), name)
    return marked
