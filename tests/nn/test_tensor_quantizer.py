import copy
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from fakequant.calib import HistogramCalibrator, MaxCalibrator
from fakequant.calib.calibrator import CALIBRATORS
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, FakeQuantError, InvalidTypeError, InvalidValueError
from fakequant.nn import QuantLinear, TensorQuantizer

calibrators = pytest.mark.parametrize("calib_method", ["max", "histogram"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)

RANGES = {
    "unknown": {},
    "per-tensor": {"amax": 1.5},
    "per-channel": {"axis": 0, "amax": [[1.0], [2.0], [4.0]]},
    "learned": {"learn_amax": True, "amax": 1.5},
    "learned-unknown": {"learn_amax": True},
}
ranges = pytest.mark.parametrize("fields", RANGES.values(), ids=RANGES)


def quantizer(num_bits: int | tuple[int, int] = 8, **fields: object) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(num_bits, **fields))


def expected_values(x: torch.Tensor, amax: np.ndarray | float, low: int = -128, high: int = 127) -> torch.Tensor:
    """DequantizeLinear(QuantizeLinear(x)) of the ONNX specification in float32, rounded once to x's dtype."""
    step = np.asarray(amax, np.float32) / np.float32(high)
    codes = np.clip(np.rint(x.detach().to(torch.float32).numpy() / step), low, high)
    return torch.from_numpy((codes * step).astype(np.float32)).to(x.dtype)


def amax_of(module: TensorQuantizer) -> list | float | None:
    return None if module.amax is None else module.amax.tolist()


# Values


@dtypes
def test_a_known_range_fixes_the_grid(dtype):
    x = (torch.randn(1000) * 2).to(dtype)
    assert torch.equal(quantizer(amax=1.5)(x), expected_values(x, 1.5))


def test_a_dynamic_quantizer_uses_the_range_of_each_call():
    module = quantizer()
    for x in (torch.randn(100), torch.randn(100) * 50):
        assert torch.equal(module(x), expected_values(x, x.abs().max().item()))


@pytest.mark.parametrize(("axis", "reduced"), [(0, (1, 2)), (-1, (0, 1)), ((0, 2), (1,)), ([2], (0, 1))], ids=str)
def test_a_dynamic_quantizer_keeps_its_axes(axis, reduced):
    x = torch.randn(3, 4, 5)
    expected = expected_values(x, np.abs(x.numpy()).max(axis=reduced, keepdims=True))
    assert torch.equal(quantizer(axis=axis)(x), expected)


def test_a_dynamic_quantizer_learns_nothing_by_being_called():
    module = quantizer()
    module(torch.randn(5))
    assert not module.is_calibrated


@pytest.mark.parametrize("fields", [{}, {"amax": 1.0}, {"axis": 0}], ids=str)
def test_an_empty_tensor_stays_empty(fields):
    assert quantizer(**fields)(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"unsigned": True}, 0, 255),
        ({"narrow_range": True}, -127, 127),
        ({"num_bits": 4}, -8, 7),
        ({"num_bits": 16}, -32768, 32767),
    ],
    ids=str,
)
def test_the_grid_is_that_of_the_descriptor(fields, low, high):
    x = torch.randn(1000) * 2
    assert torch.equal(quantizer(**fields, amax=1.5)(x), expected_values(x, 1.5, low, high))


@pytest.mark.parametrize("known", [False, True], ids=["dynamic", "known"])
def test_scale_amax_multiplies_the_range(known):
    x = torch.randn(1000)
    top = x.abs().max().item()
    module = quantizer(scale_amax=0.5, amax=top if known else None)
    assert torch.equal(module(x), expected_values(x, np.float32(top) * np.float32(0.5)))


def test_scale_amax_changes_the_scale_and_not_amax():
    module = quantizer(scale_amax=0.5, amax=127.0)
    assert (module.amax.item(), module.scale.item()) == (127.0, 0.5)


def test_training_and_evaluation_mode_give_the_same():
    module, x = quantizer(amax=1.0), torch.randn(100)
    assert torch.equal(module.train()(x), module.eval()(x))


def test_a_dead_range_gives_finite_values():
    assert quantizer(amax=0.0)(torch.zeros(4)).tolist() == [0.0] * 4


def test_gradient_passes_inside_the_grid():
    x = torch.tensor([-1.1, -1.0, 0.3, 1.0, 1.1], requires_grad=True)
    quantizer(amax=1.0)(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_dynamic_quantizer_passes_every_gradient():
    x = torch.randn(1000, requires_grad=True)
    quantizer()(x).sum().backward()
    assert x.grad.tolist() == [1.0] * 1000


@pytest.mark.parametrize("amax", [None, 2.0], ids=["dynamic", "known"])
def test_fp8_values_are_those_of_ml_dtypes(amax):
    x = torch.randn(1000)
    scale = np.float32(x.abs().max() if amax is None else amax) / np.float32(448)
    scaled = np.clip(x.numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(quantizer((4, 3), amax=amax)(x).numpy(), scaled.astype(np.float32) * scale)


@pytest.mark.parametrize("known", [False, True], ids=["dynamic", "known"])
def test_codes_are_returned_without_fake_quant(known):
    x = torch.randn(1000)
    amax = x.abs().max()
    module = quantizer(fake_quant=False, amax=amax if known else None)
    expected = np.clip(np.rint(x.numpy() / (amax.numpy() / np.float32(127))), -128, 127)
    assert np.array_equal(module(x).numpy(), expected)
    assert module.scale == amax / 127


def test_codes_follow_narrow_range():
    module = quantizer(fake_quant=False, narrow_range=True, amax=1.0)
    assert module(torch.tensor([-9.0, 9.0])).tolist() == [-127, 127]


def test_integers_are_refused():
    with pytest.raises(InvalidTypeError, match=r"inputs: expected a floating point tensor, got torch.int64"):
        quantizer(amax=1.0)(torch.arange(3))


def test_integers_pass_while_disabled():
    module = quantizer(amax=1.0)
    module.disable()
    assert module(torch.arange(3)).tolist() == [0, 1, 2]


# Switches


@pytest.mark.parametrize(
    ("off", "on"), [("disable", "enable"), ("disable_quant", "enable_quant")], ids=["all", "quant"]
)
def test_off_returns_the_input_itself(off, on):
    module, x = quantizer(amax=1.0), torch.randn(5)
    getattr(module, off)()
    assert module(x) is x
    assert not module.is_enabled
    getattr(module, on)()
    assert torch.equal(module(x), expected_values(x, 1.0))
    assert module.is_enabled


def test_collecting_changes_no_value():
    module, x = quantizer(amax=1.0), torch.randn(5)
    module.enable_calib()
    assert torch.equal(module(x), expected_values(x, 1.0))


def test_collecting_without_quantizing_returns_the_input_itself():
    module, x = TensorQuantizer(if_quant=False, if_calib=True), torch.randn(5)
    assert module(x) is x


def test_a_disabled_quantizer_collects_nothing():
    module = TensorQuantizer(disabled=True, if_calib=True)
    module(torch.randn(5))
    module.enable()
    with pytest.raises(CalibrationError, match="MaxCalibrator has seen no data"):
        module.load_calib_amax()


def test_collecting_stops():
    module = TensorQuantizer(if_calib=True)
    module(torch.tensor(1.0))
    module.disable_calib()
    module(torch.tensor(9.0))
    module.load_calib_amax()
    assert module.amax == 1.0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"disabled": True}, "disabled"),
        ({"if_quant": False}, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator"),
        ({"if_calib": True}, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant calib"),
    ],
    ids=str,
)
def test_the_constructor_sets_the_switches(arguments, line):
    assert repr(TensorQuantizer(**arguments)) == f"TensorQuantizer({line})"


# amax


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float64(2.0), np.array(2), torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0, requires_grad=True)],
    ids=["int", "float", "float64", "array", "tensor", "int64", "parameter"],
)
def test_amax_takes_any_number_and_is_float32(value):
    module = quantizer()
    module.amax = value
    assert (module.amax.item(), module.amax.dtype, module.amax.requires_grad) == (2.0, torch.float32, False)


@pytest.mark.parametrize(
    "value", [[[1], [2]], ((1.0,), (2.0,)), np.array([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]).double()], ids=repr
)
def test_amax_takes_sequences_arrays_and_tensors(value):
    module = quantizer(axis=0)
    module.amax = value
    assert (module.amax.tolist(), module.amax.dtype) == ([[1.0], [2.0]], torch.float32)


def test_amax_is_a_copy():
    value, module = torch.tensor(1.0), quantizer()
    module.amax = value
    value.fill_(9.0)
    assert module.amax == 1.0


def test_amax_of_the_descriptor_is_set():
    assert quantizer(axis=0, amax=[[1.0], [2.0]]).amax.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("fields", [{}, {"learn_amax": True}], ids=["buffer", "learned"])
def test_amax_is_forgotten(fields):
    module = quantizer(**fields, amax=1.0)
    module.amax = None
    assert module.amax is module.scale is module.step_size is None
    assert not module.is_calibrated


def test_forgetting_a_learned_range_forgets_its_gradient():
    module = quantizer(learn_amax=True, amax=1.0)
    module(torch.tensor(9.0)).backward()
    module.amax = None
    assert next(module.parameters()).grad is None


@pytest.mark.parametrize("fields", [{}, {"learn_amax": True}], ids=["buffer", "learned"])
def test_setting_amax_keeps_the_tensor_that_an_optimizer_or_ema_holds(fields):
    module = quantizer(**fields, amax=1.0)
    before = module.amax
    module.amax = 2.0
    assert module.amax is before
    assert before == 2.0


def test_a_learned_range_stays_the_same_parameter_when_it_becomes_known():
    module = quantizer(learn_amax=True)
    (before,) = module.parameters()
    module.amax = 2.0
    assert list(module.parameters()) == [before]
    assert before is module.amax


def test_another_shape_of_amax_is_refused():
    module = quantizer(axis=0, amax=[1.0, 2.0])
    with pytest.raises(InvalidValueError, match=r"amax: expected shape \(2,\), got \(3,\)"):
        module.amax = [1.0, 2.0, 3.0]


def test_another_shape_of_amax_is_fine_after_forgetting():
    module = quantizer(axis=0, amax=[1.0, 2.0])
    module.amax = None
    module.amax = [1.0, 2.0, 3.0]
    assert module.amax.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, np.array(1e300), []], ids=repr)
@pytest.mark.parametrize("before", [None, 1.0], ids=["unknown", "known"])
def test_amax_that_is_no_range_is_refused_and_changes_nothing(before, value):
    module = quantizer(amax=before)
    with pytest.raises(InvalidValueError, match="amax: expected"):
        module.amax = value
    assert amax_of(module) == before


def test_amax_of_another_type_is_refused():
    with pytest.raises(InvalidTypeError, match="amax: expected a number, sequence, array or tensor, got 'x'"):
        quantizer().amax = "x"


@pytest.mark.parametrize(
    "amax",
    [2.0, [2.0], [[[[2.0]]]]],
    ids=["0-d", "1-d", "4-d"],
)
def test_one_amax_per_tensor_fits_whatever_its_shape(amax):
    x = torch.randn(3, 4)
    result = quantizer(amax=amax)(x)
    assert result.shape == x.shape
    assert torch.equal(result, expected_values(x, 2.0))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)], ids=str)
def test_amax_per_channel_is_shaped_to_the_inputs(shape):
    x, amax = torch.randn(4, 3, 2, 2), torch.tensor([0.5, 1.0, 2.0, 4.0])
    module = quantizer(axis=0, amax=amax.reshape(shape))
    assert torch.equal(module(x), expected_values(x, amax.reshape(4, 1, 1, 1).numpy()))


@pytest.mark.parametrize("axis", [1, -1])
def test_amax_per_channel_follows_the_axis(axis):
    x, amax = torch.randn(5, 3), torch.tensor([0.5, 1.0, 2.0])
    assert torch.equal(quantizer(axis=axis, amax=amax)(x), expected_values(x, amax.numpy()))


def test_one_number_serves_every_channel():
    x = torch.randn(4, 3)
    assert torch.equal(quantizer(axis=0, amax=2.0)(x), expected_values(x, 2.0))


@pytest.mark.parametrize(
    ("fields", "amax", "shape", "expected"),
    [
        ({"axis": 0}, [1.0, 2.0, 3.0], (4, 5), (4, 1)),
        ({"axis": 0}, [[1.0]], (4, 5), (4, 1)),
        ({"axis": 0}, [1.0, 2.0], (1, 5), (1, 1)),
        ({"axis": 1}, [1.0, 2.0, 3.0, 4.0], (4, 5), (1, 5)),
        ({"axis": (0, 1)}, [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], (3, 2), (3, 2)),
        ({}, [1.0, 2.0], (2, 2), ()),
    ],
    ids=str,
)
def test_a_wrong_number_of_channels_says_both_shapes(fields, amax, shape, expected):
    module = quantizer(**fields, amax=amax)
    with pytest.raises(InvalidValueError) as error:
        module(torch.ones(shape))
    assert f"amax: expected shape {expected} for inputs of shape {shape}, axis {module.axis}, got" in str(error.value)
    assert str(error.value).endswith(f"got {tuple(module.amax.shape)}")


def test_an_axis_that_the_inputs_lack_is_refused():
    with pytest.raises(InvalidValueError, match="axis: expected -2 to 1 for a tensor of 2 dimensions, got 3"):
        quantizer(axis=3)(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"amax": 12.7}, 0.1),
        ({"amax": 25.5, "unsigned": True}, 0.1),
        ({"amax": 0.7, "num_bits": 4}, 0.1),
        ({"amax": 44.8, "num_bits": (4, 3)}, 0.1),
        ({"amax": [12.7, 127.0], "axis": 0}, [0.1, 1.0]),
        ({"amax": 0.0}, 2.0**-14),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["scale", "step_size"])
def test_scale_is_the_step_between_codes(name, fields, scale):
    assert getattr(quantizer(**fields), name).tolist() == pytest.approx(scale, rel=2**-23)


@pytest.mark.parametrize("name", ["scale", "step_size"])
def test_scale_of_a_dynamic_quantizer_is_none(name):
    module = quantizer()
    module(torch.ones(1))
    assert getattr(module, name) is None


@pytest.mark.parametrize(
    ("fields", "bound"),
    [({}, 127), ({"unsigned": True}, 255), ({"num_bits": 4}, 7), ({"num_bits": (4, 3)}, 448.0)],
    ids=str,
)
def test_maxbound(fields, bound):
    assert quantizer(**fields).maxbound == bound


def test_fp8_has_no_codes():
    with pytest.raises(InvalidValueError, match=r"bounds: expected an integer grid, got num_bits \(4, 3\)"):
        quantizer((4, 3)).bounds  # noqa: B018


# The descriptor


@pytest.mark.parametrize(("name", "value"), [("num_bits", 4), ("unsigned", True), ("narrow_range", True)])
def test_the_grid_may_be_changed(name, value):
    module, x = quantizer(amax=1.0), torch.randn(100)
    setattr(module, name, value)
    assert getattr(module.descriptor, name) == value
    assert torch.equal(module(x), quantizer(**{name: value, "amax": 1.0})(x))


def test_a_changed_grid_reaches_the_calibrator():
    module = quantizer()
    module.unsigned = True
    module.enable_calib()
    module.disable_quant()
    module(torch.tensor(-1.0))
    with pytest.raises(CalibrationError, match="negative values"):
        module.load_calib_amax()


def test_a_wrong_grid_is_refused_and_changes_nothing():
    module = quantizer()
    with pytest.raises(InvalidValueError, match="num_bits: expected 2 to 16"):
        module.num_bits = 99
    assert module.num_bits == 8


def test_learn_amax_is_fixed_at_construction():
    with pytest.raises(InvalidValueError, match="learn_amax: expected False as at construction, got pact"):
        quantizer().descriptor = QuantDescriptor(learn_amax=True)


@pytest.mark.parametrize(
    "assign", [TensorQuantizer, lambda d: setattr(quantizer(), "descriptor", d)], ids=["constructor", "property"]
)
def test_what_is_no_descriptor_is_refused(assign):
    with pytest.raises(InvalidTypeError, match="expected a QuantDescriptor, got 8"):
        assign(8)


def test_an_unknown_calibrator_is_refused_with_those_that_exist(monkeypatch):
    ours = {name: CALIBRATORS[name] for name in ("max", "histogram")}  # other tests register some of their own
    monkeypatch.setattr("fakequant.calib.calibrator.CALIBRATORS", ours)
    with pytest.raises(InvalidValueError, match=r"calib_method: expected one of \['histogram', 'max'\], got 'magic'"):
        quantizer(calib_method="magic")


# Calibration


@calibrators
@pytest.mark.parametrize(
    "arguments", [{}, {"method": "max"}, {"percentile": 99.0}, {"strict": False}, {"method": None}], ids=str
)
def test_load_calib_amax_takes_the_same_arguments_for_every_calibrator(calib_method, arguments):
    module = quantizer(calib_method=calib_method)
    module.enable_calib()
    module(torch.linspace(-1, 1, 4096))
    module.load_calib_amax(**arguments)
    assert module.amax.shape == ()
    assert 0.5 < module.amax <= 1.0


@calibrators
@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (0, (3, 1)), (1, (1, 5))], ids=str)
def test_load_calib_amax_sets_what_the_calibrator_found(calib_method, axis, shape):
    module = quantizer(calib_method=calib_method, axis=axis)
    module.enable_calib()
    module.disable_quant()
    x = torch.randn(3, 5)
    module(x)
    module.load_calib_amax("max")
    expected = np.abs(x.numpy()).max(axis=None if axis is None else 1 - axis, keepdims=axis is not None)
    assert np.array_equal(module.amax.numpy(), expected.reshape(shape))


def test_the_ancestors_call_for_a_percentile_works():
    module = quantizer(calib_method="histogram")
    module.enable_calib()
    module(torch.arange(1001.0))
    module.load_calib_amax("percentile", percentile=50.0)
    assert abs(module.amax - 500) < 1


def test_the_method_is_handed_to_the_calibrator():
    module = quantizer()
    module.enable_calib()
    module(torch.ones(1))
    with pytest.raises(InvalidValueError, match="method: expected None or 'max', got 'entropy'"):
        module.load_calib_amax("entropy")


@pytest.mark.parametrize(("calib_method", "kind"), [("max", MaxCalibrator), ("histogram", HistogramCalibrator)])
def test_no_data_is_an_error_that_says_what_to_do(calib_method, kind):
    with pytest.raises(CalibrationError, match=rf"{kind.__name__} has seen no data. Call enable_calib\(\)"):
        quantizer(calib_method=calib_method).load_calib_amax()


@calibrators
@pytest.mark.parametrize("amax", [None, 1.0], ids=["unknown", "known"])
def test_no_data_leaves_amax_alone_when_not_strict(calib_method, amax):
    module = quantizer(calib_method=calib_method, amax=amax)
    module.load_calib_amax(strict=False)
    assert amax_of(module) == amax


@calibrators
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_nan_is_an_error_even_when_not_strict(calib_method, strict):
    module = quantizer(calib_method=calib_method)
    module.enable_calib()
    module(torch.tensor([1.0, torch.nan]))
    with pytest.raises(CalibrationError, match="1 NaN"):
        module.load_calib_amax(strict=strict)
    assert not module.is_calibrated


@calibrators
def test_later_batches_do_not_change_amax(calib_method):
    module = quantizer(calib_method=calib_method)
    module.enable_calib()
    module(torch.tensor([1.0, -1.0]))
    module.load_calib_amax("max")
    module(torch.tensor([5.0, -5.0]))
    assert module.amax == 1.0


@calibrators
def test_changing_amax_does_not_change_the_calibrator(calib_method):
    module = quantizer(calib_method=calib_method)
    module.enable_calib()
    module(torch.tensor([1.0, -1.0]))
    module.load_calib_amax("max")
    with torch.no_grad():
        module.amax.fill_(9.0)
    module.load_calib_amax("max")
    assert module.amax == 1.0


def test_calibrating_again_may_change_the_shape():
    module = quantizer(axis=0, amax=[1.0, 2.0])
    module.enable_calib()
    module(torch.tensor([[3.0], [4.0]]))
    module.load_calib_amax()
    assert module.amax.tolist() == [[3.0], [4.0]]


def test_calibrating_a_learned_range_sets_the_parameter():
    module = quantizer(learn_amax=True)
    (parameter,) = module.parameters()
    module.enable_calib()
    module(torch.tensor([3.0]))
    module.load_calib_amax()
    assert parameter == 3.0


# An ordinary module


@ranges
@pytest.mark.parametrize("before", RANGES.values(), ids=RANGES)
def test_a_checkpoint_loads_strictly_whatever_the_range_before(before, fields):
    source = quantizer(**fields)
    target = TensorQuantizer(source.descriptor.replace(amax=None))
    if "amax" in before:
        target.amax = before["amax"]
    target.load_state_dict(source.state_dict(), strict=True)
    assert amax_of(target) == amax_of(source)


@ranges
def test_a_checkpoint_survives_a_file_read_with_weights_only(fields):
    file = io.BytesIO()
    source = quantizer(**fields)
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = TensorQuantizer(source.descriptor.replace(amax=None))
    target.load_state_dict(torch.load(file, weights_only=True))
    assert amax_of(target) == amax_of(source)


@ranges
@pytest.mark.parametrize("prefix", ["", "layer._input_quantizer."], ids=["alone", "inside"])
def test_the_checkpoint_of_a_float_model_loads_strictly_and_changes_nothing(prefix, fields):
    module = model = quantizer(**fields)
    for name in reversed(prefix.split(".")[:-1]):
        model = nn.ModuleDict({name: model})
    before = amax_of(module)
    model.load_state_dict({}, strict=True)
    assert amax_of(module) == before


def test_a_checkpoint_is_copied():
    source, target = quantizer(amax=1.0), quantizer()
    target.load_state_dict(source.state_dict())
    source.amax = 5.0
    assert target.amax == 1.0


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("learn_amax", [False, True], ids=["buffer", "learned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_checkpoint_of_another_dtype_becomes_float32(dtype, learn_amax, assign):
    module = quantizer(learn_amax=learn_amax)
    module.load_state_dict({"_amax": torch.tensor(1.5, dtype=dtype)}, assign=assign)
    assert (module.amax.item(), module.amax.dtype) == (1.5, torch.float32)


def test_a_loaded_range_is_used():
    module, x = quantizer(), torch.randn(100)
    module.load_state_dict({"_amax": torch.tensor(0.5)})
    assert torch.equal(module(x), expected_values(x, 0.5))


def test_a_learned_range_stays_the_same_parameter_when_loaded():
    module = quantizer(learn_amax=True)
    (before,) = module.parameters()
    module.load_state_dict({"_amax": torch.tensor(2.0)})
    assert next(module.parameters()) is before


def test_the_only_state_is_amax():
    assert list(quantizer(amax=1.0).state_dict()) == ["_amax"]


@ranges
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_equal_and_independent(duplicate, fields):
    module, x = quantizer(**fields), torch.randn(3, 8)
    expected = module(x)
    other = duplicate(module)
    assert repr(other) == repr(module)
    module.amax = None
    assert torch.equal(other(x), expected)


@calibrators
def test_a_copy_has_statistics_of_its_own(calib_method):
    module = quantizer(calib_method=calib_method)
    module.enable_calib()
    module(torch.tensor([1.0]))
    other = copy.deepcopy(module)
    module(torch.tensor([5.0]))
    other.load_calib_amax("max")
    assert other.amax == 1.0


@pytest.mark.parametrize("learn_amax", [False, True], ids=["buffer", "learned"])
@pytest.mark.parametrize("amax", [1e5, 1e-7, 0.1])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_keeps_amax_exactly(cast, amax, learn_amax):
    module = quantizer(amax=amax, learn_amax=learn_amax)
    getattr(nn.Sequential(module, nn.Linear(2, 2)), cast)()
    assert (module.amax.item(), module.amax.dtype) == (np.float32(amax), torch.float32)


def test_casting_keeps_an_unknown_range_unknown():
    assert not quantizer().half().is_calibrated


@ranges
def test_the_meta_device(fields):
    module = quantizer(**fields).to("meta")
    assert module._amax.is_meta
    assert module(torch.empty(3, 8, device="meta")).shape == (3, 8)
    assert ("amax=meta" if "amax" in fields else "amax=dynamic") in repr(module)


@ranges
def test_the_meta_device_and_a_cast_at_once(fields):
    module = quantizer(**fields).to("meta", torch.float16)
    assert (module._amax.is_meta, module._amax.dtype) == (True, torch.float32)


@ranges
def test_back_from_the_meta_device_with_a_checkpoint(fields):
    source = quantizer(**fields)
    module = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert amax_of(module) == amax_of(source)


def test_compiled_without_a_graph_break():
    module = quantizer(axis=0, amax=[1.0, 2.0])
    x = torch.randn(2, 50)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))


def test_exported():
    module = quantizer(axis=0, amax=[1.0, 2.0])
    x = torch.randn(2, 50)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_the_switch_of_old_export_scripts_exists():
    assert TensorQuantizer.use_fb_fake_quant is False


# A learned range


def test_a_learned_range_gets_the_gradient_of_what_it_clips():
    module = quantizer(learn_amax=True, amax=1.0)
    x = torch.tensor([-2.0, -1.0, 0.3, 1.0, 3.0], requires_grad=True)
    module(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert x.grad.tolist() == [0.0, 0.0, 4.0, 0.0, 0.0]
    assert module.amax.grad == 8.0 + 16.0 - 1.0 - 2.0


def test_the_lower_end_of_an_unsigned_learned_range_is_fixed():
    module = quantizer(learn_amax=True, unsigned=True, amax=1.0)
    module(torch.tensor([-2.0, 3.0])).backward(torch.tensor([1.0, 16.0]))
    assert module.amax.grad == 16.0


def test_scale_amax_reaches_the_gradient_of_a_learned_range():
    module = quantizer(learn_amax=True, amax=1.0, scale_amax=0.5)
    module(torch.tensor([0.3, 0.7, 3.0])).backward(torch.tensor([1.0, 2.0, 4.0]))
    assert module.amax.grad == 0.5 * (2.0 + 4.0)


@pytest.mark.parametrize("learn_amax", ["lsq", "pact"])
def test_values_of_a_learned_range_are_those_of_a_fixed_one(learn_amax):
    x = torch.randn(1000)
    assert torch.equal(quantizer(amax=1.0, learn_amax=learn_amax)(x), quantizer(amax=1.0)(x))


def test_values_of_a_learned_affine_range_are_those_of_a_fixed_one():
    x, (learned, fixed) = torch.randn(1000), (quantizer(affine=True, learn_amax=m) for m in ("lsq+", False))
    for module in (learned, fixed):
        module.set_range(1.0, -0.3)
    assert torch.equal(learned(x), fixed(x))


@dtypes
def test_a_learned_range_works_in_every_dtype(dtype):
    module = quantizer(learn_amax=True, amax=1.0)
    result = module(torch.tensor([0.3, 9.0], dtype=dtype))
    result.sum().backward()
    assert result.dtype == dtype
    assert (module.amax.grad.item(), module.amax.grad.dtype) == (1.0, torch.float32)


def test_a_learned_range_trains_towards_the_data():
    module = quantizer(learn_amax=True, amax=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x = torch.linspace(-2, 2, 1001)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (module(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(("amax", "scale"), [(0.0, 2.0**-14), (-12.7, 0.1)])
def test_a_learned_range_that_an_optimizer_took_below_zero_has_a_positive_scale(amax, scale):
    module = quantizer(learn_amax=True, amax=1.0)
    with torch.no_grad():
        module.amax.fill_(amax)
    assert float(module.scale) == pytest.approx(scale)
    assert (module(torch.randn(100).mul(100)).abs() <= 128.01 * scale).all()


def test_a_learned_clipping_range_per_channel_is_refused():
    with pytest.raises(FakeQuantError, match=r"learn_amax: expected axis None \(per tensor\), got axis 0"):
        quantizer(learn_amax=True, axis=0)


# repr


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant"),
        ({"amax": 1.0}, "8bit fake per-tensor amax=1.0000 calibrator=MaxCalibrator quant"),
        (
            {"axis": 0, "amax": [[1.0], [2.0]], "narrow_range": True},
            "8bit narrow fake axis=0 amax=[1.0000, 2.0000](2) calibrator=MaxCalibrator quant",
        ),
        ({"axis": (0, 1)}, "8bit fake axis=(0, 1) amax=dynamic calibrator=MaxCalibrator quant"),
        (
            {"unsigned": True, "scale_amax": 0.5, "calib_method": "histogram"},
            "unsigned 8bit fake per-tensor amax=dynamic *0.5 calibrator=HistogramCalibrator quant",
        ),
        ({"fake_quant": False}, "8bit per-tensor amax=dynamic calibrator=MaxCalibrator quant"),
        ({"num_bits": (4, 3)}, "(4, 3)bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant"),
        (
            {"learn_amax": True, "amax": 1.0},
            "8bit fake per-tensor amax=1.0000 learned calibrator=MaxCalibrator quant",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_repr(fields, line):
    assert repr(quantizer(**fields)) == f"TensorQuantizer({line})"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_a_checkpoint_with_a_bad_range_is_refused(value):
    quantizer = TensorQuantizer(QuantDescriptor(amax=2.0))
    with pytest.raises(RuntimeError, match=r"_amax: expected finite values >= 0"):
        quantizer.load_state_dict({"_amax": torch.tensor(value)})
    assert quantizer.amax.item() == 2.0


# Another grid


@pytest.mark.parametrize("amax", [None, 1.0], ids=["new", "fixed before"])
def test_a_grid_that_fixes_another_range_sets_it(amax):
    module = quantizer(amax=amax)
    module.descriptor = QuantDescriptor(8, amax=2.0)
    assert module.amax == 2.0


def test_a_grid_of_the_same_range_keeps_what_was_set():
    module = quantizer(amax=1.0)
    module.amax = 1.5
    module.num_bits = 4
    assert module.amax == 1.5


def test_a_range_that_is_forgotten_leaves_no_scale():
    module = TensorQuantizer(QuantDescriptor(8, fake_quant=False))
    module.amax = 1.0
    module(torch.ones(2))
    module.amax = None
    assert module.scale is None


@pytest.mark.parametrize(("amin", "error"), [("x", InvalidTypeError), (1.0, InvalidValueError)])
def test_a_lower_end_that_is_none_is_refused(amin, error):
    with pytest.raises(error, match="amin: expected"):
        quantizer(affine=True).set_range(1.0, amin)


# Learned ranges count their elements


def test_all_elements_of_a_weight_share_a_step_also_if_it_is_no_parameter(monkeypatch):
    layer = QuantLinear(3, 2, quant_desc_weight=QuantDescriptor(4, learn_amax="lsq"))
    layer.weight_quantizer.amax = 1.0
    counts = []

    def note(grid, x, amax, amin, *, count):
        counts.append(count)
        return x

    monkeypatch.setattr("fakequant.nn.modules.tensor_quantizer.fake_quantize_learned", note)
    torch.func.functional_call(layer, {"weight": torch.ones(2, 3)}, torch.ones(5, 3))
    assert counts == [6]


def test_a_scheme_for_weights_is_refused_for_the_input_of_a_module():
    with pytest.raises(InvalidValueError, match="quant_desc_input: expected a grid for inputs, got scheme 'twn'"):
        QuantLinear(3, 2, quant_desc_input=QuantDescriptor(2, scheme="twn"))
