"""Graphs as ONNX text."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest


def parse(body: str, metadata: dict[str, dict[str, str]] | None = None, opset: int = 19) -> ir.Model:
    """Return a model from the text of a graph; metadata is by output of the node."""
    ours = ', "fakequant" : 1' if "fakequant." in body else ""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{ours}]> {body}')
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.metadata_props.update((metadata or {}).get(node.outputs[0].name, {}))
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """Return the outputs in ONNX Runtime, without optimizations."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    """Return the op types in order."""
    return [node.op_type for node in model.graph]


@pytest.fixture(name="parse", scope="session")
def _parse() -> Callable[..., ir.Model]:
    return parse


@pytest.fixture(name="run", scope="session")
def _run() -> Callable[..., list[np.ndarray]]:
    return run


@pytest.fixture(name="ops", scope="session")
def _ops() -> Callable[[ir.Model], list[str]]:
    return ops
