"""The layers of a TensorRT engine: what IEngineInspector says of them, and IProfiler.

A layer of an engine is a kernel, in which several nodes of the file may be fused.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

_TYPES = {
    "int8": "int8",
    "fp8": "fp8",
    "e4m3": "fp8",
    "int4": "int4",
    "fp4": "fp4",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float": "fp32",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "bool": "bool",
}
"""The words of the inspector, in small letters; which it uses depends on the layer and on the version."""

_WORD = re.compile(r"[a-z0-9]+")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclasses.dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Args:
        name: in the engine.
        kind: of the layer, such as ``"CaskConvolution"``.
        precision: type of its first input, as ``"int8"``, ``"fp16"``, ``"fp32"``; "" for a layer without.
        output: type of its first output, likewise.
        nodes: names of the nodes of the file that it computes, as far as the engine says; () for a copy.
        milliseconds: of the last run; None if the profiler did not name the layer.
    """

    name: str
    kind: str
    precision: str
    output: str
    nodes: tuple[str, ...]
    milliseconds: float | None

    def __str__(self) -> str:
        """Return one line."""
        time = "      ?" if self.milliseconds is None else f"{self.milliseconds:7.3f}"
        types = self.precision if self.precision == self.output else f"{self.precision} to {self.output}"
        return f"{time} ms  {types:<13}  {self.kind}  {self.name}"


def read_layers(information: str, milliseconds: Mapping[str, float]) -> tuple[EngineLayer, ...]:
    """Return the layers of an engine.

    Args:
        information: of the inspector, as JSON, of an engine built with detailed profiling verbosity.
        milliseconds: {layer: time} of one run.
    """
    # Without detailed verbosity a layer is its name only.
    layers = [layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, dict)]
    return tuple(
        EngineLayer(
            name=layer["Name"],
            kind=layer.get("LayerType", ""),
            precision=_type_of(layer.get("Inputs")),
            output=_type_of(layer.get("Outputs")),
            nodes=_nodes_of(layer),
            milliseconds=milliseconds.get(layer["Name"]),
        )
        for layer in layers
    )


def _nodes_of(layer: dict[str, Any]) -> tuple[str, ...]:
    """Return the nodes of the file; before TensorRT 8.6 only the layer's name has them."""
    if layer.get("LayerType") == "Reformat":
        return ()
    return tuple(_NODE.findall(layer.get("Metadata", ""))) or tuple(layer["Name"].split(" + "))


def _type_of(tensors: list[dict[str, Any]] | None) -> str:
    """Return the type of the first tensor: ``"Channel major INT8 format where ..."`` or ``"Int8"``."""
    if not tensors:
        return ""
    first = {key.lower(): str(value) for key, value in tensors[0].items()}
    # TensorRT 11 has the type in a field of its own.
    written = first.get("datatype") or first.get("format/datatype", "")
    words = _WORD.findall(written.lower())
    return next((_TYPES[word] for word in words if word in _TYPES), written)
