"""The targets: where a file is going to run, and where quantizers stand for it.

====================  ===========  ==============================================
target                placement    runs on
====================  ===========  ==============================================
``tensorrt``          tensorrt     TensorRT
``tensorrt-ep``       tensorrt     ONNX Runtime, its TensorRT provider
``onnxruntime-cuda``  tensorrt     ONNX Runtime, its CUDA provider
``onnxruntime``       onnxruntime  ONNX Runtime, its CPU provider
====================  ===========  ==============================================

A model is placed once for each placement; its targets share the quantizers and the rules
of recipes. They differ in what export writes and in what is checked.
"""

from fakequant.errors import InvalidValueError

_PLACEMENT_OF = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "tensorrt",
    "tensorrt": "tensorrt",
    "tensorrt-ep": "tensorrt",
}


def placement_names() -> frozenset[str]:
    """Return the names of all placements."""
    return frozenset(_PLACEMENT_OF.values())


def placement_of(target: str) -> str:
    """Return the placement of a target.

    Raises:
        InvalidValueError: unknown target; lists all of them.

    >>> placement_of("tensorrt-ep")
    'tensorrt'
    """
    if target not in _PLACEMENT_OF:
        raise InvalidValueError(f"target: expected one of {sorted(_PLACEMENT_OF)}, got {target!r}")
    return _PLACEMENT_OF[target]
