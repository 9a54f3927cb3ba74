"""The tensors among the arguments of a model: their names in the graph, and which of their dimensions are dynamic."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fakequant.errors import ExportError


@dataclasses.dataclass(frozen=True)
class TensorInput:
    """One input of a graph.

    Args:
        name: in the graph, if the caller gives no other: forward's name, with those of what it holds behind it.
        tensor: the example.
        dynamic: {axis: name of its size}.
    """

    name: str
    tensor: Tensor
    dynamic: Mapping[int, str]


def tensor_inputs(
    model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
) -> list[TensorInput]:
    """Return the tensors in args, in the order in which both of torch's exporters take them.

    Args:
        model: what is called with them.
        args: positional arguments; tensors may be in lists, tuples and dicts.
        dynamic_shapes: as for torch.export.

    Raises:
        ExportError: args do not fit forward, or dynamic_shapes does not fit args.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args).arguments
    except TypeError as error:
        raise ExportError(f"args: expected what {type(model).__name__}.forward takes, got {error}") from None
    shapes = _by_argument(list(bound), dynamic_shapes)
    return list(_tensors(bound, shapes))


def _by_argument(names: list[str], dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None) -> Mapping[str, Any]:
    if dynamic_shapes is None:
        return dict.fromkeys(names)
    is_named = isinstance(dynamic_shapes, Mapping)
    if set(dynamic_shapes) != set(names) if is_named else len(dynamic_shapes) != len(names):
        raise ExportError(f"dynamic_shapes: expected an entry for each of {', '.join(names)}, got {dynamic_shapes}")
    return dict(dynamic_shapes if is_named else zip(names, dynamic_shapes, strict=True))


def _tensors(bound: Mapping[str, Any], shapes: Mapping[str, Any]) -> Iterator[TensorInput]:
    for path, leaf in pytree.tree_leaves_with_path(dict(bound)):
        if not isinstance(leaf, Tensor):
            continue
        keys = [dataclasses.astuple(key)[0] for key in path]  # type: ignore[call-overload]
        name = "_".join(re.sub("[^a-zA-Z0-9]", "_", str(key)).lower() for key in keys)  # as torch.export does
        shape: Any = shapes
        try:
            for key in keys:
                shape = None if shape is None else shape[key]
        except (KeyError, IndexError, TypeError):
            raise ExportError(f"dynamic_shapes: expected the structure of args, got none for {name}") from None
        yield TensorInput(name, leaf, _dynamic_axes(name, leaf, shape))


def _dynamic_axes(name: str, tensor: Tensor, shape: Any) -> dict[int, str]:
    """Return {axis: name of its size} from one tensor's entry: None, {axis: Dim}, or a Dim for each axis."""
    axes = dict(shape if isinstance(shape, Mapping) else enumerate(shape or ()))
    if unknown := [axis for axis in axes if not 0 <= axis < tensor.ndim]:
        raise ExportError(
            f"dynamic_shapes: expected axes of {name} with shape {tuple(tensor.shape)}, got {unknown[0]} among them"
        )
    return {
        axis: dim if isinstance(dim, str) else getattr(dim, "__name__", f"{name}_{axis}")
        for axis, dim in axes.items()
        if not (dim is None or isinstance(dim, int) or dim == Dim.STATIC)
    }


def check_dynamic(graph: ir.Graph, inputs: Sequence[TensorInput], fixed: frozenset[str] = frozenset()) -> None:
    """Raise ExportError if a dimension that should be dynamic is not.

    Args:
        graph: as traced.
        inputs: of the graph.
        fixed: names of sizes that have one value only.
    """
    for value, wanted in zip(graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for axis in wanted.dynamic:
            if isinstance(value.shape[axis], int) or str(value.shape[axis]) in fixed:
                raise ExportError(
                    f"dynamic_shapes: expected axis {axis} of {value.name} to be dynamic, got "
                    f"{wanted.tensor.shape[axis]} as its only size: the model computes with it as a constant"
                )
