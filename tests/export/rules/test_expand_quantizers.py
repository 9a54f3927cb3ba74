"""Markers become Q and DQ with the grid of the quantizer that they name."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fakequant as fq
from fakequant.export.graph import CALL_KEY, MODULE_KEY, QUANTIZER_KEY, constant_of
from fakequant.export.rules.expand_quantizers import ExpandQuantizers

D = fq.QuantDescriptor
ACTIVATION = 'agraph (float[N, 3] x) => (float[N, 3] y) { y = fakequant.Quantizer<name = "q">(x) }'
WEIGHT = """
agraph (float[1, 2] x) => (float[1, 2] y)
<float[2, 2] w = {-9.0, 0.6, 0.25, 1.6}>
{ d = fakequant.Quantizer<name = "w">(w) y = MatMul(x, d) }
"""
X = np.array([[-3.0, 0.2, 0.5], [0.37, -0.11, 9.0]], dtype=np.float32)


def quantizers(**descriptors: D) -> dict[str, fq.TensorQuantizer]:
    return {name: fq.TensorQuantizer(descriptor) for name, descriptor in descriptors.items()}


def expand(parse, text: str, metadata=None, **descriptors: D) -> ir.Model:
    model = parse(text, metadata)
    assert ExpandQuantizers(quantizers(**descriptors))(model).modified
    return model


GRIDS = {
    "int8": D(amax=1.0),
    "int8-narrow": D(amax=1.0, narrow_range=True),
    "uint8": D(amax=1.0, unsigned=True),
    "int4": D(4, amax=0.7),
    "int4-narrow": D(4, amax=0.7, narrow_range=True),
    "uint4": D(4, amax=0.6, unsigned=True),
    "int8-per-channel": D(axis=1, amax=[[0.4, 1.0, 2.0]]),
    "int4-per-channel": D(4, axis=1, amax=[[0.4, 1.0, 2.0]]),
    "amax-without-ones": D(axis=1, amax=[0.4, 1.0, 2.0]),
    "negative-axis": D(axis=-1, amax=[0.4, 1.0, 2.0]),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_an_activation_computes_what_torch_does(parse, run, grid):
    (got,) = run(expand(parse, ACTIVATION, q=GRIDS[grid]), x=X)
    expected = fq.TensorQuantizer(GRIDS[grid])(torch.from_numpy(X)).numpy()
    if grid == "int8-narrow":  # the one clamp that is left out
        expected[0, 0] = np.float32(-128) * (np.float32(1) / np.float32(127))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("grid", "dtype"), [("int8", np.int8), ("uint8", np.uint8), ("int4", np.int8), ("uint4", np.uint8)]
)
def test_the_type_of_the_codes(parse, grid, dtype):
    (quantize,) = [n for n in expand(parse, ACTIVATION, q=GRIDS[grid]).graph if n.op_type == "QuantizeLinear"]
    zero_point = constant_of(quantize.inputs[2])
    assert (zero_point.dtype, zero_point.tolist()) == (dtype, 0)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("int8", ["QuantizeLinear", "DequantizeLinear"]),
        ("int8-narrow", ["QuantizeLinear", "DequantizeLinear"]),
        ("int4", ["Max", "Min", "QuantizeLinear", "DequantizeLinear"]),
    ],
)
def test_only_grids_narrower_than_their_type_are_clamped(parse, ops, grid, expected):
    assert ops(expand(parse, ACTIVATION, q=GRIDS[grid])) == expected


def test_fp8(parse, run, ops):
    model = expand(parse, ACTIVATION, q=D((4, 3), amax=448.0))
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear"]
    expected = X.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(run(model, x=X)[0], expected)


def test_names_and_metadata(parse):
    text = ACTIVATION.replace("y = ", 'a = fakequant.Quantizer<name = "q">(x) y = ').replace(">(x) }", ">(a) }")
    model = expand(parse, text, {"a": {CALL_KEY: "0"}, "y": {CALL_KEY: "1"}}, q=D(amax=1.0))
    assert [node.name for node in model.graph] == [
        "q.QuantizeLinear",
        "q.DequantizeLinear",
        "q.QuantizeLinear.2",
        "q.DequantizeLinear.2",
    ]
    for node, call in zip(model.graph, "0011", strict=True):
        assert node.metadata_props == {MODULE_KEY: "q", QUANTIZER_KEY: "q", CALL_KEY: call}
    assert model.graph[0].outputs[0].name == "q.QuantizeLinear.output"


def test_a_graph_output_keeps_its_name(parse):
    assert expand(parse, ACTIVATION, q=D(amax=1.0)).graph.outputs[0].name == "y"


def test_no_foreign_domain_is_left(parse):
    assert set(expand(parse, ACTIVATION, q=D(amax=1.0)).opset_imports) == {""}


def test_other_floats_are_cast(parse, run, ops):
    model = expand(parse, ACTIVATION.replace("float[", "double["), q=D(amax=1.0))
    assert ops(model) == ["Cast", "QuantizeLinear", "DequantizeLinear", "Cast"]
    (got,) = run(model, x=X.astype(np.float64))
    np.testing.assert_array_equal(got, fq.TensorQuantizer(D(amax=1.0))(torch.from_numpy(X)).numpy())


def test_a_weight_is_stored_as_codes(parse, ops):
    model = expand(parse, WEIGHT, w=D(axis=0, amax=[[1.27], [63.5]], narrow_range=True))
    assert ops(model) == ["DequantizeLinear", "MatMul"]
    codes = constant_of(model.graph[0].inputs[0])
    assert codes.dtype == np.int8
    # 0.25 / 0.5 is a tie: to the even code; -9 is clamped.
    assert codes.tolist() == [[-127, 60], [0, 3]]
    assert model.graph[0].attributes.get_int("axis") == 0


def test_a_narrow_grid_bounds_the_stored_codes(parse):
    model = expand(parse, WEIGHT, w=D(4, axis=0, amax=[[0.07], [3.5]]))
    assert constant_of(model.graph[0].inputs[0]).tolist() == [[-8, 7], [0, 3]]


TIED = """
agraph (float[1, 2] x) => (float[1, 2] y)
<float[2, 2] w = {-9.0, 0.6, 0.25, 1.6}>
{
    d = fakequant.Quantizer<name = "w">(w) a = MatMul(x, d)
    e = fakequant.Quantizer<name = "v">(w) y = MatMul(a, e)
}
"""


@pytest.mark.parametrize(("other", "count"), [(1.0, 1), (2.0, 2)])
def test_a_tied_weight_is_stored_once_a_grid(parse, other, count):
    model = expand(parse, TIED, w=D(amax=1.0), v=D(amax=other))
    assert len({node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"}) == count


@given(
    weight=arrays(np.float32, (2, 2), elements=st.floats(-8, 8, width=32)),
    amax=st.floats(0.125, 16, width=32),
    bits=st.integers(2, 8),
)
def test_stored_codes_dequantize_to_what_torch_computes(parse, run, weight, amax, bits):
    model = parse(WEIGHT)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    made = quantizers(w=D(bits, narrow_range=True, amax=amax))
    ExpandQuantizers(made)(model)
    (got,) = run(model, x=np.array([[1.0, 0.0]], np.float32))
    np.testing.assert_array_equal(got[0], made["w"](torch.from_numpy(weight))[0].numpy())
