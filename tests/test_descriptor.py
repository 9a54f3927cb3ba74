import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fakequant import descriptor as descriptor_module
from fakequant.descriptor import QuantDescriptor, ScaledQuantDescriptor
from fakequant.errors import InvalidTypeError, InvalidValueError

# The fields of each preset that are not at their default (8 bit signed, per tensor).
PRESETS = {
    "QUANT_DESC_8BIT_PER_TENSOR": {},
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR": {"unsigned": True},
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL": {"axis": 0, "narrow_range": True},
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL": {"axis": 0, "narrow_range": True},
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL": {"axis": 0, "narrow_range": True},
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW": {"axis": 0, "narrow_range": True},
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL": {"axis": 1, "narrow_range": True},
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL": {"axis": 1, "narrow_range": True},
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL": {"axis": 1, "narrow_range": True},
}
FORMATS = ["dict", "json", "yaml"]


def there_and_back(descriptor: QuantDescriptor, form: str) -> QuantDescriptor:
    if form == "dict":
        return QuantDescriptor.from_dict(descriptor.dict())
    if form == "json":
        return QuantDescriptor.from_json(descriptor.to_json())
    return QuantDescriptor.from_yaml(descriptor.to_yaml())


floats32 = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
integer_grids = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.integers(2, 16),
        "fake_quant": st.booleans(),
        "unsigned": st.booleans(),
        "narrow_range": st.booleans(),
    },
)
ranges = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "axis": st.one_of(st.integers(-4, 3), st.lists(st.integers(-4, 3), min_size=1, unique=True).map(tuple)),
            "amax": st.one_of(floats32, st.lists(st.lists(floats32, min_size=2, max_size=2), min_size=1, max_size=3)),
        },
    ),
    st.fixed_dictionaries({"learn_amax": st.sampled_from([False, True, "pact", "lsq"])}, optional={"amax": floats32}),
    st.fixed_dictionaries({"dynamic": st.just(True)}, optional={"axis": st.just("tokens")}),
    st.fixed_dictionaries(
        {"block_size": st.integers(2, 256), "fake_quant": st.just(True)}, optional={"block_axis": st.integers(-2, 1)}
    ),
)
others = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(st.characters(codec="utf-8")),
        "scale_amax": st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
        "calib_method": st.sampled_from(["max", "mine"]),
    },
)
descriptors = st.builds(
    lambda grid, *rest: QuantDescriptor(**{k: v for fields in (grid, *rest) for k, v in fields.items()}),
    integer_grids,
    ranges,
    others,
) | st.builds(
    QuantDescriptor,
    st.sampled_from([(4, 3), (5, 2), (2, 1)]),
    block_size=st.sampled_from([None, 16, 32]),
    dynamic=st.booleans(),
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 8.0}, r"num_bits: expected an int or one of .*, got 8.0"),
        ({"num_bits": "8"}, r"num_bits: expected an int or one of .*, got '8'"),
        ({"num_bits": None}, r"num_bits: expected an int or one of .*, got None"),
        ({"num_bits": True}, r"num_bits: expected an int or one of .*, got True"),
        ({"name": 3}, "name: expected str or None, got 3"),
        ({"fake_quant": 1}, "fake_quant: expected bool, got 1"),
        ({"unsigned": "no"}, "unsigned: expected bool, got 'no'"),
        ({"narrow_range": None}, "narrow_range: expected bool, got None"),
        ({"learn_amax": 0}, "learn_amax: expected a bool or one of .*, got 0"),
        ({"axis": "0"}, "axis: expected None, an int, a tuple of ints or 'tokens', got '0'"),
        ({"axis": 1.0}, "axis: expected None, an int, a tuple of ints or 'tokens', got 1.0"),
        ({"axis": True}, "axis: expected None, an int, a tuple of ints or 'tokens', got True"),
        ({"axis": (0, 1.5)}, r"axis: expected None, an int, a tuple of ints or 'tokens', got \(0, 1.5\)"),
        ({"amax": "1"}, "amax: expected a number, sequence, array or tensor, got '1'"),
        ({"amax": True}, "amax: expected a number, sequence, array or tensor, got True"),
        ({"amax": 1j}, "amax: expected a number, sequence, array or tensor, got 1j"),
        ({"amax": ["1"]}, r"amax: expected a number, sequence, array or tensor, got \['1'\]"),
        ({"amax": [[1.0], [1.0, 2.0]]}, "amax: expected a number, sequence, array or tensor, got"),
        ({"amax": torch.tensor(1j)}, "amax: expected a number, sequence, array or tensor, got tensor"),
        ({"scale_amax": "2"}, "scale_amax: expected a number or None, got '2'"),
        ({"scale_amax": True}, "scale_amax: expected a number or None, got True"),
        ({"calib_method": None}, "calib_method: expected str, got None"),
        ({"scheme": None}, "scheme: expected str, got None"),
        ({"scale_format": 8}, "scale_format: expected str, got 8"),
        ({"affine": 1}, "affine: expected bool, got 1"),
        ({"dynamic": None}, "dynamic: expected bool, got None"),
        ({"block_size": 32.0}, "block_size: expected an int or None, got 32.0"),
        ({"block_axis": "0"}, "block_axis: expected an int, got '0'"),
        ({"learn_amax": True, "axis": 0}, r"learn_amax: expected axis None \(per tensor\), got axis 0"),
    ],
    ids=str,
)
def test_a_wrong_type_says_expected_and_got(fields, message):
    with pytest.raises(InvalidTypeError, match=message):
        QuantDescriptor(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 1}, r"num_bits: expected 2 to 16 or one of .*, got 1"),
        ({"num_bits": 0}, r"num_bits: expected 2 to 16 or one of .*, got 0"),
        ({"num_bits": -1}, r"num_bits: expected 2 to 16 or one of .*, got -1"),
        ({"num_bits": 17}, r"num_bits: expected 2 to 16 or one of .*, got 17"),
        ({"num_bits": (3, 4)}, r"num_bits: expected 2 to 16 or one of .*, got \(3, 4\)"),
        ({"num_bits": 0, "scheme": "bnn"}, r"num_bits: expected 1 to 16 or one of .*, got 0"),
        ({"axis": ()}, r"axis: expected one or more different axes, got \(\)"),
        ({"axis": (1, 1)}, r"axis: expected one or more different axes, got \(1, 1\)"),
        ({"amax": -1.0}, "amax: expected finite values >= 0, at least one, got -1.0"),
        ({"amax": float("nan")}, "amax: expected finite values >= 0, at least one, got nan"),
        ({"amax": float("inf")}, "amax: expected finite values >= 0, at least one, got inf"),
        ({"amax": 1e39}, r"amax: expected finite values >= 0, at least one, got 1e\+39"),
        ({"amax": [1.0, -2.0]}, r"amax: expected finite values >= 0, at least one, got \[1.0, -2.0\]"),
        ({"amax": []}, r"amax: expected finite values >= 0, at least one, got \[\]"),
        ({"scale_amax": 0.0}, "scale_amax: expected a finite value > 0, got 0.0"),
        ({"scale_amax": -1}, "scale_amax: expected a finite value > 0, got -1"),
        ({"scale_amax": float("nan")}, "scale_amax: expected a finite value > 0, got nan"),
        ({"scale_amax": float("inf")}, "scale_amax: expected a finite value > 0, got inf"),
        ({"learn_amax": True, "amax": [1.0, 2.0]}, r"learn_amax: expected one amax \(per tensor\), got \(1.0, 2.0\)"),
        ({"block_size": 1}, "block_size: expected 2 or more, got 1"),
        ({"scale_format": "int8"}, "scale_format: expected one of .*, got 'int8'"),
        ({"num_bits": (4, 3), "unsigned": True}, r"num_bits \(4, 3\): expected unsigned=False, got True"),
        ({"num_bits": (5, 2), "narrow_range": True}, r"num_bits \(5, 2\): expected narrow_range=False, got True"),
        ({"num_bits": (2, 1), "fake_quant": False}, r"num_bits \(2, 1\): expected fake_quant=True, got False"),
        ({"num_bits": (4, 3), "affine": True}, r"num_bits \(4, 3\): expected affine=False, got True"),
        ({"num_bits": (4, 3), "learn_amax": "lsq"}, r"num_bits \(4, 3\): expected learn_amax=False, got 'lsq'"),
        ({"affine": True, "narrow_range": True}, "affine=True: expected narrow_range=False, got True"),
        ({"dynamic": True, "amax": 1.0}, "dynamic=True: expected amax=None, got 1.0"),
        ({"dynamic": True, "learn_amax": "lsq"}, "dynamic=True: expected learn_amax=False, got 'lsq'"),
        ({"axis": "tokens"}, "axis 'tokens': expected dynamic=True, got False"),
        ({"block_size": 32, "axis": 0}, "block_size: expected axis=None, got 0"),
        ({"learn_amax": "lsq+"}, r"learn_amax 'lsq\+': expected affine=True, got False"),
        ({"learn_amax": "lsq", "affine": True}, "learn_amax 'lsq': expected affine=False, got True"),
        ({"scale_format": "e8m0"}, "scale_format 'e8m0': expected a block_size, got None"),
        ({"scale_format": "e4m3", "block_size": 16}, r"scale_format 'e4m3': expected num_bits=\(2, 1\), got 8"),
        ({"scheme": "twn", "affine": True}, "scheme 'twn': expected affine=False, got True"),
        ({"scheme": "twn", "amax": 1.0}, "scheme 'twn': expected amax=None, got 1.0"),
    ],
    ids=str,
)
def test_a_wrong_value_says_expected_and_got(fields, message):
    with pytest.raises(InvalidValueError, match=message):
        QuantDescriptor(**fields)


def test_only_num_bits_and_name_are_positional():
    with pytest.raises(TypeError, match="positional"):
        QuantDescriptor(8, "name", True)


@pytest.mark.parametrize("num_bits", range(2, 17))
def test_every_width_from_2_to_16_is_accepted(num_bits):
    assert QuantDescriptor(num_bits).num_bits == num_bits


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("num_bits", np.int64(4), 4),
        ("num_bits", [4, 3], (4, 3)),
        ("axis", np.int32(-1), -1),
        ("axis", [0, 2], (0, 2)),
        ("amax", 2, 2.0),
        ("amax", np.float64(0.1), float(np.float32(0.1))),
        ("amax", (1, 2), (1.0, 2.0)),
        ("amax", [[0.5], [1.5]], ((0.5,), (1.5,))),
        ("amax", np.arange(3.0)[::-1], (2.0, 1.0, 0.0)),
        ("amax", np.float16(0.1), float(np.float16(0.1))),
        ("amax", torch.tensor([[1.0], [2.0]], requires_grad=True), ((1.0,), (2.0,))),
        ("amax", torch.tensor(3, dtype=torch.int64), 3.0),
        ("amax", torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625),
        ("scale_amax", np.float32(0.5), 0.5),
        ("scale_amax", 2, 2.0),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_field_is_kept_in_plain_python_types(field, given, kept):
    value = getattr(QuantDescriptor(**{field: given}), field)
    assert (value, type(value)) == (kept, type(kept))


def test_a_descriptor_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantDescriptor().num_bits = 4


def test_an_unknown_field_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantDescriptor().num_bit = 4


@pytest.mark.parametrize("amax", [1.5, [1.0, 2.0], [[[1.0]], [[2.0]]]], ids=str)
def test_equal_descriptors_are_equal_and_hash_alike(amax):
    one, other = QuantDescriptor(axis=0, amax=amax), QuantDescriptor(axis=0, amax=np.array(amax))
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_bits": 4},
        {"name": "other"},
        {"fake_quant": False},
        {"axis": 0},
        {"axis": -1},
        {"amax": 1.0},
        {"amax": [1.0, 2.0]},
        {"learn_amax": True},
        {"scale_amax": 2.0},
        {"calib_method": "histogram"},
        {"unsigned": True},
        {"narrow_range": True},
        {"affine": True},
        {"dynamic": True},
        {"block_size": 32},
        {"block_axis": 0},
        {"scale_format": "power_of_two"},
        {"scheme": "twn"},
    ],
    ids=str,
)
def test_descriptors_that_differ_in_one_field_are_unequal(fields):
    assert QuantDescriptor(**fields) != QuantDescriptor()


def test_descriptors_that_differ_in_one_element_of_amax_are_unequal():
    assert QuantDescriptor(axis=0, amax=[1.0, 2.0]) != QuantDescriptor(axis=0, amax=[1.0, 3.0])


def test_a_descriptor_is_unequal_to_other_types():
    assert QuantDescriptor() != "QuantDescriptor(8bit fake per-tensor)"


@pytest.mark.parametrize(("num_bits", "fp8"), [(8, False), ((4, 3), True)], ids=str)
def test_is_float(num_bits, fp8):
    assert QuantDescriptor(num_bits).is_float is fp8


def test_learn_amax_true_is_pact():
    assert QuantDescriptor(learn_amax=True) == QuantDescriptor(learn_amax="pact")


@pytest.mark.parametrize("num_bits", [(4, 3), (5, 2), (2, 1)], ids=str)
def test_a_float_format_has_no_power_of_two_scale(num_bits):
    with pytest.raises(InvalidValueError, match="expected scale_format='float32', got 'power_of_two'"):
        QuantDescriptor(num_bits, scale_format="power_of_two")


def test_one_bit_is_for_schemes():
    assert QuantDescriptor(1, scheme="bnn").num_bits == 1


def test_replace_changes_the_named_fields_only():
    weight = QuantDescriptor(8, "w", axis=0, narrow_range=True)
    assert weight.replace(num_bits=4) == QuantDescriptor(4, "w", axis=0, narrow_range=True)


def test_replace_checks():
    with pytest.raises(InvalidTypeError, match="learn_amax: expected axis None"):
        QuantDescriptor(axis=0).replace(learn_amax=True)


def test_replace_refuses_an_unknown_field():
    with pytest.raises(TypeError, match="bits"):
        QuantDescriptor().replace(bits=4)


def test_the_former_name_is_the_same_class():
    assert ScaledQuantDescriptor is QuantDescriptor


def test_the_presets_are_those_of_the_ancestor():
    assert {name for name in vars(descriptor_module) if name.startswith("QUANT_DESC_")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    assert getattr(descriptor_module, name) == QuantDescriptor(8, **PRESETS[name])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back(name, form):
    preset = getattr(descriptor_module, name)
    assert there_and_back(preset, form) == preset


@pytest.mark.parametrize("form", FORMATS)
@given(descriptor=descriptors)
def test_a_descriptor_comes_back_bit_for_bit(form, descriptor):
    back = there_and_back(descriptor, form)
    assert (back, repr(back)) == (descriptor, repr(descriptor))


def test_dict_has_num_bits_and_name_and_what_is_not_default():
    assert QuantDescriptor(unsigned=True).dict() == {"num_bits": 8, "name": None, "unsigned": True}


def test_the_constructor_takes_what_dict_returned():
    descriptor = QuantDescriptor(4, "w", axis=(0, 1), amax=[[1.0], [2.0]], calib_method="histogram", narrow_range=True)
    assert QuantDescriptor(**descriptor.dict()) == descriptor


def test_json_is_json():
    assert json.loads(QuantDescriptor(axis=0, amax=[1.0]).to_json()) == {
        "num_bits": 8,
        "name": None,
        "axis": 0,
        "amax": [1.0],
    }


def test_yaml_is_yaml():
    assert yaml.safe_load(QuantDescriptor((4, 3), "n").to_yaml()) == {"num_bits": [4, 3], "name": "n"}


def test_block_style_yaml_is_read():
    text = "axis:\n- 0\n- 1\namax: 1.5\nname: n\nnum_bits: 4\nfake_quant: false\nunsigned: true\n"
    assert QuantDescriptor.from_yaml(text) == QuantDescriptor(
        4, "n", axis=(0, 1), amax=1.5, fake_quant=False, unsigned=True
    )


def test_an_unknown_key_is_named():
    with pytest.raises(InvalidValueError, match=r"expected keys among \['num_bits', 'name', .* got \['bits', 'foo'\]"):
        QuantDescriptor.from_dict({"num_bits": 8, "foo": 1, "bits": 4})


def test_values_from_a_file_are_checked():
    with pytest.raises(InvalidValueError, match="num_bits: expected 2 to 16"):
        QuantDescriptor.from_json('{"num_bits": 99}')


@pytest.mark.parametrize(("form", "text"), [("json", "[8]"), ("json", "8"), ("yaml", "- num_bits\n"), ("yaml", "")])
def test_a_file_that_is_no_mapping_is_refused(form, text):
    with pytest.raises(InvalidTypeError, match="QuantDescriptor: expected a mapping of fields, got"):
        getattr(QuantDescriptor, f"from_{form}")(text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "QuantDescriptor(8bit fake per-tensor)"),
        ({"axis": 0, "narrow_range": True}, "QuantDescriptor(8bit narrow fake axis=0)"),
        ({"axis": (0, 1)}, "QuantDescriptor(8bit fake axis=(0, 1))"),
        ({"num_bits": (4, 3)}, "QuantDescriptor((4, 3)bit fake per-tensor)"),
        ({"fake_quant": False, "amax": [1, 2]}, "QuantDescriptor(8bit real per-tensor amax=(1.0, 2.0))"),
        ({"learn_amax": True, "amax": 1}, "QuantDescriptor(8bit fake per-tensor amax=1.0 learn_amax)"),
        ({"learn_amax": "lsq", "axis": 0}, "QuantDescriptor(8bit fake axis=0 learn_amax=lsq)"),
        (
            {"dynamic": True, "affine": True, "unsigned": True},
            "QuantDescriptor(dynamic affine unsigned 8bit fake per-tensor)",
        ),
        ({"num_bits": 4, "block_size": 64}, "QuantDescriptor(4bit fake blocks=64 along -1)"),
        (
            {"num_bits": (4, 3), "block_size": 32, "scale_format": "e8m0"},
            "QuantDescriptor((4, 3)bit fake blocks=32 along -1 scale=e8m0)",
        ),
        ({"num_bits": 2, "scheme": "twn", "axis": 0}, "QuantDescriptor(twn 2bit fake axis=0)"),
        (
            {"name": "n", "unsigned": True, "axis": 0, "amax": 1.0, "scale_amax": 0.5},
            "n: (unsigned 8bit fake axis=0 amax=1.0 scale_amax=0.5)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_str(fields, text):
    assert str(QuantDescriptor(**fields)) == text


def test_repr_evaluates_to_an_equal_descriptor():
    descriptor = QuantDescriptor(4, "w", axis=0, amax=[1.0, 2.0], scale_amax=0.5)
    assert eval(repr(descriptor)) == descriptor


@pytest.mark.parametrize(("read", "text"), [(QuantDescriptor.from_json, "{"), (QuantDescriptor.from_yaml, "a: [")])
def test_a_text_that_is_none_is_refused(read, text):
    with pytest.raises(InvalidValueError, match="text: expected"):
        read(text)


def test_a_block_axis_of_numpy_is_an_int():
    grid = QuantDescriptor(8, block_size=32, block_axis=np.int64(1))
    assert QuantDescriptor.from_json(grid.to_json()) == grid


@pytest.mark.parametrize(
    "fields",
    [{"num_bits": 2, "scheme": "twn", "scale_amax": 0.5}, {"block_size": 32, "calib_method": "histogram"}],
    ids=["a scheme has its own scale", "a histogram a block"],
)
def test_what_would_have_no_effect_or_not_fit_is_refused(fields):
    with pytest.raises(InvalidValueError, match="expected (scale_amax=None|calib_method='max')"):
        QuantDescriptor(**fields)
