"""The graph as torch's TorchScript exporter traces it, for the opsets below those of the torch.export based one.

It leaves what the other one leaves: inputs under forward's names, parameters under their own
names and not copied, and in the metadata of each node the modules that it was traced in.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript import optimizer
from torch import Tensor, nn
from torch.onnx import symbolic_helper
from torch.utils import _pytree as pytree

from fakequant.export.graph import DOMAIN, MARKER
from fakequant.export.rules.drop_expands import DropExpands
from fakequant.export.rules.name_nodes import SCOPES_KEY
from fakequant.export.tensor_inputs import TensorInput

MIN_OPSET = 13

_TORCH, _FAKEQUANT = Path(torch.__file__).parent, Path(__file__).parents[1]


@symbolic_helper.parse_args("v", "s")
def _marker(g: Any, x: Any, name: str) -> Any:
    return g.op(f"{DOMAIN}::{MARKER}", x, name_s=name).setType(x.type())


torch.onnx.register_custom_op_symbolic("fakequant::quantizer", _marker, MIN_OPSET)


def trace_torchscript(
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: Sequence[TensorInput],
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """Return the graph of a model as it is, in no training mode.

    Args:
        model: its quantizers are to be traced as markers.
        args: example inputs.
        inputs: the tensors in args.
        opset: 13 or later.
        input_names: of the graph.
        output_names: of the graph.
    """
    called_with_tensors = _CalledWithTensors(model, args)
    given = list(input_names or ())
    names = [*given, *(tensor.name for tensor in inputs[len(given) :])]
    file = io.BytesIO()
    torch.onnx.export(
        called_with_tensors,
        tuple(tensor.tensor for tensor in inputs),
        file,  # type: ignore[arg-type]
        kwargs={},  # else a dict as the last argument is taken for them
        dynamo=False,
        opset_version=opset,
        input_names=names,
        output_names=output_names,
        dynamic_axes={name: dict(tensor.dynamic) for name, tensor in zip(names, inputs, strict=True)},
        # The parameters are inputs, to be given their own memory below: no limit of 2 GiB, no copies, no
        # comparison of all with all, and no folding that would change or rename them.
        export_params=False,
        keep_initializers_as_inputs=True,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    traced = ir.from_proto(onnx.load_from_string(file.getvalue()))
    _restore_inputs(traced.graph, names, inputs, called_with_tensors.state_dict())
    _restore_scopes(traced.graph, [name for name, _ in model.named_modules()], output_names)
    DropExpands()(traced)
    _infer_shapes(traced)
    return traced


class _CalledWithTensors(nn.Module):
    """A model called with the tensors among its arguments; the others are fixed. Numbers stand for names of modules.

    The exporter would make inputs of numbers and defaults, and keep the last part only of the name of a module.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        self._called = model
        self._leaves, self._structure = pytree.tree_flatten(args)
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        outputs = self._called(*pytree.tree_unflatten(leaves, self._structure))
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))

    def named_modules(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "", self
        for number, module in enumerate(self._called.modules()):
            yield str(number), module

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self._called.state_dict(*args, **options)


def warn_of_sizes(caught: Sequence[warnings.WarningMessage]) -> None:
    """Warn of sizes that the user's code read as numbers: constants, in a trace. Torch's own code only checks them."""
    places = dict.fromkeys(
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if str(warning.message).startswith("Converting a tensor to a Python")
        and not any(Path(warning.filename).is_relative_to(folder) for folder in (_TORCH, _FAKEQUANT))
    )
    if places:
        warnings.warn(
            f"dynamic_shapes: {', '.join(places)} reads a size or value of a tensor as a number, which below opset 18 "
            "becomes a constant. If it is more than a check, the file is wrong at other sizes: use a later opset",
            stacklevel=4,
        )


def _restore_inputs(
    graph: ir.Graph, names: Sequence[str], inputs: Sequence[TensorInput], state: dict[str, Tensor]
) -> None:
    """Let the graph have the inputs that the model has, unused ones too, and the parameters as initializers."""
    found = {str(value.name): value for value in graph.inputs}
    graph.inputs.clear()
    for name, wanted in zip(names, inputs, strict=True):
        shape = ir.Shape(wanted.dynamic.get(axis, size) for axis, size in enumerate(wanted.tensor.shape))
        dtype = ir.tensor_adapters.from_torch_dtype(wanted.tensor.dtype)
        unused = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        graph.inputs.append(found.pop(name, unused))
    for name, value in found.items():
        value.const_value = ir.tensor(state[name], name=name)
        graph.register_initializer(value)


def _restore_scopes(graph: ir.Graph, modules: Sequence[str], output_names: Sequence[str] | None) -> None:
    """Name nodes and values after modules: ``/1/4_1/Conv`` is the second call of module 4."""
    for node in graph.all_nodes():
        *scopes, op = (node.name or "").split("/")
        calls = [scope.partition("_") for scope in scopes if scope]
        path = [modules[int(number)] for number, *_ in calls]
        node.metadata_props[SCOPES_KEY] = repr([*path, op])
        again = ["".join(rest) for _, *rest in calls]
        node.name = "/".join([*map("".join, zip(path, again, strict=True)), op]).lstrip("/")
        for index, output in enumerate(node.outputs):
            if not (output_names and output.is_graph_output()):
                output.name = f"{node.name}.{index}"


def _infer_shapes(model: ir.Model) -> None:
    """Infer all shapes: those that markers were traced with are the example's, where a size is dynamic too."""
    nodes, outputs = list(model.graph.all_nodes()), list(model.graph.outputs)
    ranks = [None if value.shape is None else len(value.shape) for value in outputs]
    for value in [value for node in nodes for value in node.outputs]:
        value.shape = None
    markers = {node: node.attributes.pop("name") for node in nodes if node.domain == DOMAIN}
    for marker in markers:
        # Like a quantizer, it has the shape of its input, and unlike an Identity it is not dropped.
        marker.domain, marker.op_type = "", "Neg"
    optimizer.fold_constants(model, should_fold=lambda node: False if node in markers else None)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)  # follows sizes through Shape, Slice and Concat
    for marker, name in markers.items():
        marker.domain, marker.op_type = DOMAIN, MARKER
        marker.attributes.add(name)
    for value, rank in zip(outputs, ranks, strict=True):
        if value.shape is None and rank is not None:
            value.shape = ir.Shape([None] * rank)
