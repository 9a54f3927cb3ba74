"""Which types, targets and opsets go together."""

import pytest

from fakequant.errors import InvalidValueError
from fakequant.export.rules.float_dtype import float_rewrites


def test_float32_needs_no_rewrite():
    assert float_rewrites("float32", "onnxruntime", 18) == ()


@pytest.mark.parametrize(
    ("float_dtype", "target", "opset", "message"),
    [
        ("half", "tensorrt", 19, r"float_dtype: expected 'float32' or one of \['bfloat16', 'float16'\], got 'half'"),
        ("float16", "onnxruntime", 20, "expected 'float32' for target 'onnxruntime', got 'float16'"),
        ("bfloat16", "tensorrt", 18, "opset: expected 19 or later, the first whose scales may be bfloat16, got 18"),
    ],
    ids=["type", "target", "opset"],
)
def test_a_bad_argument(float_dtype, target, opset, message):
    with pytest.raises(InvalidValueError, match=message):
        float_rewrites(float_dtype, target, opset)
