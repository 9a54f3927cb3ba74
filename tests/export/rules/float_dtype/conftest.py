"""Graphs whose floats have another type."""

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from fakequant.export.graph import MODULE_KEY
from fakequant.export.rules.float_dtype import FloatDtype


@pytest.fixture(scope="session")
def half(parse) -> Callable[..., tuple[ir.Model, FloatDtype]]:
    """Return the valid model of a text in another float type, and the pass; modules by output of their node."""

    def run(text: str, name: str = "float16", **modules: str) -> tuple[ir.Model, FloatDtype]:
        model = parse(text, {output: {MODULE_KEY: module} for output, module in modules.items()})
        rewrite = FloatDtype(name)
        rewrite(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        return model, rewrite

    return run


def _types(model: ir.Model) -> dict[str, ir.DataType]:
    """Return the types of all inputs and outputs of nodes, by name."""
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    return {value.name: value.dtype for value in values}


def _casts_beside_pairs(model: ir.Model) -> list[str]:
    """Return the Casts in front of Q and behind DQ."""
    pair = {"QuantizeLinear", "DequantizeLinear"}
    found = []
    for cast in (node for node in model.graph.all_nodes() if node.op_type == "Cast"):
        beside = [cast.inputs[0].producer(), *cast.outputs[0].consumers()]
        found += [cast.name for node in beside if node is not None and node.op_type in pair]
    return found


@pytest.fixture(scope="session")
def types() -> Callable[[ir.Model], dict[str, ir.DataType]]:
    return _types


@pytest.fixture(scope="session")
def casts_beside_pairs() -> Callable[[ir.Model], list[str]]:
    return _casts_beside_pairs
