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

from fakequant.call_sites import TRANSLATIONS
from fakequant.errors import ExportError
from fakequant.export.graph import DOMAIN, MARKER
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating

_LIBRARY = torch.library.Library("fakequant", "DEF")
_LIBRARY.define("quantizer(Tensor x, str name) -> Tensor")
_LIBRARY.impl("quantizer", lambda x, name: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("quantizer", lambda x, name: torch.empty_like(x), "Meta")

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
    with evaluating(model), _marked(quantizers), warnings.catch_warnings():
        # torch warns about its own internals here; what matters to the user is checked by export_onnx.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,  # type: ignore[arg-type]
                input_names=input_names,
                output_names=output_names,
                custom_translation_table={**TRANSLATIONS, torch.ops.fakequant.quantizer.default: _marker},
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch raises its own types, unrelated to each other
            raise ExportError(f"torch.onnx.export failed for {type(model).__name__}: {error}") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _marked(quantizers: Mapping[str, TensorQuantizer]) -> Iterator[None]:
    """Let the calls of quantizers be traced as markers for a with block."""
    for name, quantizer in quantizers.items():
        quantizer.forward = functools.partial(_mark, quantizer, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.forward


def _mark(quantizer: TensorQuantizer, name: str, inputs: Tensor) -> Tensor:
    values, _ = quantizer.checked(inputs)
    marked: Tensor = torch.ops.fakequant.quantizer(values, name)
    return marked
