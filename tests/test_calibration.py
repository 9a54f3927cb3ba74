import copy
import functools
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fakequant
from fakequant.arithmetic import DEAD_SCALE
from fakequant.calib import MaxCalibrator, register_calibrator
from fakequant.calib.calibrator import CALIBRATORS
from fakequant.calibration import calibrate
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError
from fakequant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from fakequant.nn.walk import named_quantizers
from fakequant.presets import preset
from fakequant.qat import lower_bits
from fakequant.recipe import Rule

METHODS = ["max", "entropy", "percentile", "mse", "auto"]
every_method = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """Two layers whose statistics do not depend on how the samples are split into batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = QuantConv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = QuantLinear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class OneByOne(nn.Module):
    """Quantizers alone, so that what reaches them is exactly the data."""

    def __init__(self, descriptor: QuantDescriptor = QuantDescriptor(8)) -> None:  # noqa: B008 - immutable
        super().__init__()
        self.quantizer = TensorQuantizer(descriptor)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)


class Branches(nn.Module):
    """``unused`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = QuantLinear(3, 3), QuantLinear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 2, 6, 6)


def run(model, data, method="max", **options):
    return calibrate(model, data, method, progress=False, **options)


def amaxes(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if q.amax is None else q.amax.clone() for name, q in named_quantizers(model)}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Exactness.


HEAVY_TAILED = torch.from_numpy(np.random.default_rng(0).standard_t(2, size=(12, 3, 40)).astype(np.float32))
SPLITS = {
    "one by one backwards": HEAVY_TAILED.flip(0).split(1),
    "uneven": HEAVY_TAILED.tensor_split([1, 2, 9]),
    "shuffled": HEAVY_TAILED[torch.from_numpy(np.random.default_rng(1).permutation(12))].split(5),
}


@functools.cache
def range_of(method: str, axis: int | None, split: str | None) -> Tensor:
    model = OneByOne(QuantDescriptor(8, axis=axis))
    run(model, SPLITS[split] if split else [HEAVY_TAILED], method)
    return model.quantizer.amax


@pytest.mark.parametrize("axis", [None, 1], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("split", SPLITS)
@every_method
def test_order_and_split_of_the_data_do_not_matter(method, split, axis):
    assert torch.equal(range_of(method, axis, split), range_of(method, axis, None))


def test_max_is_numpys_maximum():
    data, model = torch.randn(4, 100), OneByOne()
    run(model, data.split(1))
    assert model.quantizer.amax.item() == np.abs(data.numpy()).max()


def test_max_per_channel_is_numpys_maximum():
    data, model = torch.randn(4, 5, 100), OneByOne(QuantDescriptor(8, axis=1))
    run(model, data.split(1))
    assert np.array_equal(model.quantizer.amax.numpy(), np.abs(data.numpy()).max((0, 2), keepdims=True))


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99])
def test_percentile_is_numpys_to_the_next_bin(percentile):
    data, model = torch.randn(40_000), OneByOne()
    run(model, data.split(1000), "percentile", percentile=percentile)
    values = np.abs(data.numpy())
    exact = np.quantile(values, percentile / 100, method="inverted_cdf")
    assert exact <= model.quantizer.amax.item() <= exact + 2.0 ** (np.frexp(values.max())[1] - 12)


def test_weight_range_is_the_maximum_of_each_channel():
    model = Net()
    run(model, [images()], "entropy")
    expected = np.abs(model.conv.weight.detach().numpy()).max((1, 2, 3), keepdims=True)
    assert np.array_equal(model.conv.weight_quantizer.amax.numpy(), expected)


def test_activation_range_is_that_of_the_float_model():
    model, seen = Net(), []
    model.eval()
    float_model = fakequant.dequantize(copy.deepcopy(model))
    float_model.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    x = images()
    float_model(x)
    run(model, [x])
    assert model.fc.input_quantizer.amax == seen[0]


@every_method
def test_one_pass_serves_the_other_methods(method):
    x, model, other = images(), Net(), Net()
    other.load_state_dict(model.state_dict())
    run(model, [x], "entropy").apply(method)
    run(other, [x], method)
    assert same(amaxes(model), amaxes(other))


@every_method
def test_auto_is_never_worse(method):
    x, model = torch.randn(5000) ** 3, OneByOne()
    calibration = run(model, [x], "auto")
    best = calibration.ranges[0].sqnr_db
    assert best >= calibration.apply(method).ranges[0].sqnr_db


def test_weight_method_mse_clips_weights():
    model = nn.Sequential(QuantLinear(4000, 2, quant_desc_weight=QuantDescriptor(4, axis=0)))
    nn.init.normal_(model[0].weight)
    run(model, [torch.randn(2, 4000)], weight_method="mse")
    assert (model[0].weight_quantizer.amax < model[0].weight.detach().abs().amax(1, keepdim=True)).all()


def test_weight_method_is_not_for_activations():
    model, x = nn.Sequential(QuantLinear(4000, 2, quant_desc_input=QuantDescriptor(4))), torch.randn(2, 4000)
    run(model, [x], weight_method="mse")
    assert model[0].input_quantizer.amax == x.abs().max()


@every_method
def test_ancestors_loop_gives_the_same(method):
    grid = QuantDescriptor(8, calib_method="max" if method == "max" else "histogram")
    batches = torch.randn(3, 4, 5) ** 3
    model, manual = (nn.Sequential(QuantLinear(5, 2, quant_desc_input=grid)) for _ in range(2))
    manual.load_state_dict(model.state_dict())
    run(model, batches, method)
    every = [quantizer for _, quantizer in named_quantizers(manual)]
    for quantizer in every:
        quantizer.disable_quant()
        quantizer.enable_calib()
    for batch in batches:
        manual(batch)
    manual[0].input_quantizer.load_calib_amax(method)
    manual[0].weight_quantizer.load_calib_amax()
    for quantizer in every:
        quantizer.disable_calib()
        quantizer.enable_quant()
    assert same(amaxes(model), amaxes(manual))
    assert torch.equal(model(batches[0]), manual(batches[0]))


# Data.


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(6)), None),
        (lambda x: [x, "label"], None),
        (lambda x: {"x": x}, None),
        (lambda x: {"image": x, "id": 3}, lambda model, batch: model(batch["image"])),
        (lambda x: (x, 1, 2), lambda model, batch: model(batch[0])),
    ],
    ids=["tensor", "pair", "list", "dict", "forward of a dict", "forward of a triple"],
)
def test_kinds_of_batches(batch, forward):
    x, model, expected = images(), Net(), Net()
    expected.load_state_dict(model.state_dict())
    run(expected, [x])
    run(model, [batch(x)], forward=forward)
    assert same(amaxes(model), amaxes(expected))


@pytest.mark.parametrize("batch", [3, "x", (1, 2), None, np.zeros(3)], ids=["int", "str", "pair", "None", "array"])
def test_other_batches_are_refused_with_the_way_out(batch):
    with pytest.raises(InvalidTypeError, match=r"batch: expected .*Pass forward=lambda model, batch"):
        run(Net(), [batch])


@pytest.mark.parametrize("as_data", [list, iter], ids=["list", "generator"])
def test_num_batches_are_used(as_data):
    model = OneByOne()
    calibration = run(model, as_data([torch.ones(1), 2 * torch.ones(1), 9 * torch.ones(1)]), num_batches=2)
    assert (calibration.num_batches, model.quantizer.amax) == (2, 2)


def test_no_batch_more_than_num_batches_is_taken():
    stream = iter([torch.ones(1), torch.zeros(1)])
    run(OneByOne(), stream, num_batches=1)
    assert len(list(stream)) == 1


def test_num_batches_above_the_data_uses_all():
    assert run(OneByOne(), [torch.ones(1)] * 3, num_batches=99).num_batches == 3


@pytest.mark.parametrize(("data", "num_batches"), [([], None), (iter([]), 3)], ids=["list", "generator"])
def test_no_data_is_an_error_that_names_the_quantizers(data, num_batches):
    with pytest.raises(CalibrationError, match=r"data: expected at least one batch, got none; no range for quantizer"):
        run(OneByOne(), data, num_batches=num_batches)


@pytest.mark.parametrize("num_batches", [-1, 0])
def test_num_batches_is_at_least_one(num_batches):
    with pytest.raises(InvalidValueError, match=f"num_batches: expected at least 1, got {num_batches}"):
        run(OneByOne(), [torch.ones(1)], num_batches=num_batches)


def test_num_batches_may_be_numpys():
    assert run(OneByOne(), [torch.ones(1)] * 3, num_batches=np.int64(2)).num_batches == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("num_batches", value) for value in (1.5, float("nan"), float("inf"), "3", [3], True)],
        *[("method", value) for value in (["max"], None, 3)],
        *[("weight_method", value) for value in (["max"], None)],
        *[("percentile", value) for value in ("99", None, [99])],
        *[("processes", value) for value in (True, "x", 4)],
        ("forward", "x"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_refused_before_data_is_read(option, value):
    data = iter([torch.ones(1)])
    with pytest.raises(InvalidTypeError, match=f"^{option}: expected "):
        calibrate(OneByOne(), data, progress=False, **{option: value})
    assert len(list(data)) == 1


@pytest.mark.parametrize("data", [None, 5], ids=str)
def test_data_that_is_not_iterable_is_refused(data):
    with pytest.raises(InvalidTypeError, match=f"^data: expected an iterable of batches, got {data}"):
        run(OneByOne(), data)


@pytest.mark.parametrize("model", [None, "x", [torch.ones(1)]], ids=["None", "str", "data"])
def test_no_model_is_refused(model):
    with pytest.raises(InvalidTypeError, match=f"^model: expected an nn.Module, got {type(model).__name__}"):
        run(model, OneByOne())


@pytest.mark.parametrize("percentile", [0.9999, 1, True, -5, float("nan"), 101], ids=str)
def test_a_percentile_out_of_range_is_refused_before_data_is_read(percentile):
    data = iter([torch.ones(1)])
    with pytest.raises(InvalidValueError, match="percentile: expected percent, above 1 and at most 100, got "):
        run(OneByOne(), data, "max", percentile=percentile)
    assert len(list(data)) == 1


def test_empty_batches_are_an_error():
    with pytest.raises(CalibrationError, match="quantizer: was called with empty tensors only"):
        run(OneByOne(), [torch.ones(0)])


def test_batches_are_not_kept():
    alive = []

    def batches():
        for _ in range(5):
            batch = torch.randn(3, 2, 6, 6)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 1

    calibration = run(Net(), batches(), "entropy")
    assert calibration.num_batches == 5
    assert not any(reference() is not None for reference in alive)


@every_method
def test_state_does_not_grow_with_the_data(method):
    model = OneByOne()
    sizes = [held_bytes(run(model, torch.randn(n, 100), method)) for n in (2, 50)]
    assert sizes[0] == sizes[1]


# What cannot be calibrated is named.


def test_quantizer_that_is_never_called_is_named():
    with pytest.raises(CalibrationError, match=r"1 quantizers have no range:\n  unused._input_quantizer: was never"):
        run(Branches(), [torch.randn(2, 3)])


def test_quantizer_that_is_never_called_stays_uncalibrated_if_not_strict():
    model = Branches()
    run(model, [torch.randn(2, 3)], strict=False)
    calibrated = {name for name, q in named_quantizers(model) if q.is_calibrated}
    assert calibrated == {"used._input_quantizer", "used._weight_quantizer", "unused._weight_quantizer"}


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_nan_and_inf_are_named_with_counts(method):
    bad = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan])
    with pytest.raises(CalibrationError, match=r"quantizer: the data held 3 NaN and 2 Inf"):
        run(OneByOne(), [torch.ones(2), bad], method)


def test_nan_in_a_weight_is_named():
    model = Net()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"\n  fc._weight_quantizer: the data held 1 NaN and 0 Inf"):
        run(model, [images()])


def test_every_bad_quantizer_is_named():
    model = Net()
    with torch.no_grad():
        model.conv.weight[0, 0] = torch.inf
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError) as error:
        run(model, [images()], strict=False)
    assert {"conv._weight_quantizer", "fc._weight_quantizer"} <= set(str(error.value).replace(":", " ").split())


@pytest.mark.parametrize("method", ["max", "mse"])
def test_negative_values_on_an_unsigned_grid_are_named(method):
    with pytest.raises(CalibrationError, match=r"quantizer: .*minimum -2.*unsigned"):
        run(OneByOne(QuantDescriptor(8, unsigned=True)), [torch.tensor([1.0, -2.0])], method)


def test_unsigned_grid_on_data_that_fits():
    model = OneByOne(QuantDescriptor(8, unsigned=True))
    run(model, [torch.tensor([0.0, 2.0])])
    assert model.quantizer(torch.tensor([2.0])) == 2


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), OneByOne(QuantDescriptor(amax=1.0))],
    ids=["no quantizer", "fixed ranges only"],
)
def test_nothing_to_calibrate_is_an_error(model):
    with pytest.raises(InvalidValueError, match="model: expected an enabled quantizer whose range comes from data"):
        run(model, [torch.ones(1)])


FOR_ACTIVATIONS = (
    r"^method: expected one of \['auto', 'entropy', 'lsq', 'max', 'mse', 'percentile'\] for activations, got "
)
FOR_WEIGHTS = r"^weight_method: expected one of \['lsq', 'max', 'mse'\] for weights, got "
REFUSED = [
    *[({"method": method}, FOR_ACTIVATIONS + repr(method)) for method in ("best", "")],
    *[
        ({"weight_method": method}, FOR_WEIGHTS + repr(method))
        for method in ("best", "", "auto", "entropy", "percentile")
    ],
]
refused_methods = pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])


@refused_methods
def test_unknown_method_is_refused_before_the_data_is_read(options, message):
    data = iter([images()])
    with pytest.raises(InvalidValueError, match=message):
        run(Net(), data, **options)
    assert len(list(data)) == 1


@refused_methods
def test_apply_refuses_an_unknown_method(options, message):
    calibration = run(Net(), [images()], "entropy")
    with pytest.raises(InvalidValueError, match=message):
        calibration.apply(**{"method": "max", **options})


@pytest.mark.parametrize("learn_amax", [False, "pact"])
@pytest.mark.parametrize("option", ["method", "weight_method"])
def test_lsq_needs_a_range_that_it_trains(learn_amax, option):
    layer, data = QuantLinear(3, 3, quant_desc_weight=QuantDescriptor(8, learn_amax=learn_amax)), iter([images()])
    with pytest.raises(InvalidValueError, match="^method 'lsq': expected a range that LSQ or LSQ"):
        run(layer, data, **{option: "lsq"})
    assert len(list(data)) == 1


def test_ranges_that_lsq_does_not_train_have_their_extremes():
    layer = QuantLinear(3, 3, quant_desc_weight=QuantDescriptor(4, learn_amax="lsq"))
    run(layer, [torch.tensor([[1.0, -3.0, 2.0]])], "lsq", weight_method="lsq")
    assert layer.input_quantizer.amax == 3.0


def test_lsq_starts_a_weight_that_it_trains():
    layer = QuantLinear(3, 3, quant_desc_weight=QuantDescriptor(4, learn_amax="lsq"))
    run(layer, [torch.ones(2, 3)], weight_method="lsq")
    expected = 2 * 7**0.5 * layer.weight.abs().mean()
    assert layer.weight_quantizer.amax.item() == pytest.approx(expected.item(), rel=1e-3)


# Another range from the same pass.


def test_apply_searches_on_the_present_grids():
    model, wanted, data = Net(), Net(), [images()]
    wanted.load_state_dict(model.state_dict())
    calibration = run(model, data, "mse")
    lower_bits(model, 4)
    lower_bits(wanted, 4)
    run(wanted, data, "mse")
    calibration.apply("mse")
    assert same(amaxes(model), amaxes(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": 1}, "quantizer: axis: expected None, for which data was collected, got 1"),
        ({"calib_method": "tenfold"}, "quantizer: calib_method: expected 'histogram', .* got 'tenfold'"),
        ({"amax": 3.0}, "quantizer: expected a grid whose range comes from data, got "),
        ({"dynamic": True}, "quantizer: expected a grid whose range comes from data, got "),
    ],
    ids=str,
)
def test_apply_refuses_a_grid_that_the_pass_did_not_collect_for(tenfold, change, message):
    model = OneByOne()
    calibration = run(model, [torch.ones(2, 3)], "mse")
    model.quantizer.descriptor = model.quantizer.descriptor.replace(**change)
    before = amaxes(model)
    with pytest.raises(CalibrationError, match=message):
        calibration.apply("mse")
    assert same(amaxes(model), before)


@pytest.mark.parametrize("again", [False, True], ids=["dequantized", "quantized again"])
def test_apply_refuses_quantizers_that_the_model_no_longer_has(again):
    model = nn.Sequential(nn.Linear(3, 3))
    fakequant.quantize(model)
    calibration = run(model, [torch.ones(2, 3)], "mse")
    fakequant.dequantize(model)
    if again:
        fakequant.quantize(model)
    with pytest.raises(CalibrationError, match=r"^0\._input_quantizer, 0\._weight_quantizer: no longer in the model"):
        calibration.apply("mse")


def test_method_that_this_pass_did_not_collect_for_is_refused():
    calibration = run(Net(), [images()], "max")
    with pytest.raises(InvalidValueError, match=r"'entropy'.*keeps maxima only; collect with a HistogramCalibrator"):
        calibration.apply("entropy")


def test_refused_method_leaves_the_ranges():
    model = Net()
    calibration = run(model, [images()], "max")
    before = amaxes(model)
    with pytest.raises(InvalidValueError):
        calibration.apply("entropy")
    assert same(amaxes(model), before)


def test_nothing_is_written_on_an_error():
    model = Net()
    run(model, [images()])
    before = amaxes(model)
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError):
        run(model, [9 * images()])
    assert same(amaxes(model), before)


def test_failed_apply_writes_nothing():
    model = Net()
    calibration = run(model, [images()], "entropy")
    before = amaxes(model)
    with pytest.raises(InvalidValueError):
        calibration.apply("percentile", percentile=101)
    assert same(amaxes(model), before)


# The model is left as it was.


def states(model: nn.Module) -> list[object]:
    switches = [(q._disabled, q._if_quant, q._if_calib, id(q._calibrator)) for _, q in named_quantizers(model)]
    return [switches, [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]]


def odd_model() -> Net:
    """Modes and switches that differ from module to module."""
    model = Net()
    model.norm.eval()
    model.fc.weight_quantizer.disable()
    model.fc.input_quantizer.enable_calib()
    model.conv.weight_quantizer.disable_quant()
    return model


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_modes_and_switches_are_restored(method):
    model = odd_model()
    before = states(model)
    run(model, [images()], method)
    assert states(model) == before


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_modes_and_switches_are_restored_after_an_exception(method):
    def batches():
        yield images()
        raise OSError("disk")

    model = odd_model()
    before = states(model)
    with pytest.raises(OSError, match="disk"):
        run(model, batches(), method)
    assert states(model) == before


def test_exception_inside_the_model_writes_nothing():
    model = Net()
    with pytest.raises(RuntimeError):
        run(model, [images(), torch.randn(1, 99, 6, 6)])
    assert set(amaxes(model).values()) == {None}


def test_calibrator_of_the_quantizer_stays_empty():
    model = OneByOne()
    run(model, [torch.ones(2)])
    assert model.quantizer._calibrator.compute_amax() is None


def test_batch_norm_statistics_do_not_move():
    model = Net().train()
    run(model, [5 + images()])
    assert torch.equal(model.norm.running_mean, torch.zeros(3))


def test_weights_and_gradients_are_untouched():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    run(model, [images()])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items() if "amax" not in key)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_mode_is_restored():
    run(Net(), [images()])
    assert torch.is_grad_enabled()


def test_ranges_carry_no_gradient():
    model = Net()
    run(model, [images()], "mse", weight_method="mse")
    assert not any(q.amax.requires_grad for _, q in named_quantizers(model))


# Which quantizers.


def test_fixed_range_is_kept():
    model = Net()
    model.conv = QuantConv2d(2, 3, 3, quant_desc_input=QuantDescriptor(amax=0.25))
    names = [r.name for r in run(model, [images()]).ranges]
    assert model.conv.input_quantizer.amax == 0.25
    assert "conv._input_quantizer" not in names


def test_disabled_quantizer_stays_uncalibrated():
    model = Net()
    model.conv.input_quantizer.disable()
    run(model, [images()])
    assert not model.conv.input_quantizer.is_calibrated


def test_quantizers_are_off_while_calibrating():
    model, x = Net(), images()
    fine, coarse = copy.deepcopy(model), copy.deepcopy(model)
    coarse.conv.input_quantizer.num_bits = 2
    run(fine, [x])
    run(coarse, [x])
    assert torch.equal(fine.fc.input_quantizer.amax, coarse.fc.input_quantizer.amax)


def test_second_calibration_replaces_the_first():
    model = OneByOne()
    run(model, [9 * torch.ones(1)])
    run(model, [2 * torch.ones(1)])
    assert model.quantizer.amax == 2


def test_grid_changed_to_another_axis_calibrates_anew():
    model = OneByOne()
    run(model, [torch.ones(2, 3)])
    model.quantizer.descriptor = QuantDescriptor(8, axis=1)
    run(model, [torch.ones(2, 3)])
    assert model.quantizer.amax.shape == (1, 3)


def test_module_called_twice_sees_both_inputs():
    layer = QuantLinear(2, 2)
    model = nn.Sequential(layer, nn.Hardtanh(), layer)
    with torch.no_grad():
        layer.weight.fill_(5)
    run(model, [torch.full((1, 2), 0.5)])
    assert layer.input_quantizer.amax == 1


def test_tied_weight_gets_equal_ranges():
    model = nn.Sequential(QuantLinear(3, 3), QuantLinear(3, 3))
    model[1].weight = model[0].weight
    run(model, [torch.randn(2, 3)])
    assert torch.equal(model[0].weight_quantizer.amax, model[1].weight_quantizer.amax)


def test_learned_range_starts_at_the_calibrated_one():
    model = OneByOne(QuantDescriptor(8, learn_amax=True))
    run(model, [torch.tensor([3.0])])
    assert isinstance(model.quantizer.amax, nn.Parameter)
    assert model.quantizer.amax == 3


def test_converted_model_calibrates():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    fakequant.quantize(model, preset("int8") + Rule("3", input=None))
    assert [r.name for r in run(model, [images()]).ranges] == [
        "0._input_quantizer",
        "0._weight_quantizer",
        "3._weight_quantizer",
    ]


# The result.


def test_dead_channels_are_counted():
    model = Net()
    with torch.no_grad():
        model.conv.weight[1].zero_()
    ranges = {r.name: r for r in run(model, [images()]).ranges}
    assert ranges["conv._weight_quantizer"].dead_channels == 1
    assert ranges["conv._input_quantizer"].dead_channels == 0


def test_dead_channel_has_the_dead_scale():
    model = Net()
    with torch.no_grad():
        model.conv.weight[1].zero_()
    run(model, [images()])
    assert model.conv.weight_quantizer.scale[1].item() == DEAD_SCALE


def test_ranges_are_those_of_the_quantizers():
    model = Net()
    calibration = run(model, [images()], "entropy")
    assert same({r.name: r.amax for r in calibration.ranges}, amaxes(model))


def test_ranges_do_not_share_memory_with_the_quantizers():
    model = OneByOne()
    calibration = run(model, [torch.ones(1)])
    with torch.no_grad():
        model.quantizer.amax.fill_(5)
    assert calibration.ranges[0].amax == 1


def test_sqnr_is_that_of_the_data():
    x, model = torch.rand(100_000) - 0.5, OneByOne()
    (found,) = run(model, [x], "entropy").ranges
    noise = model(x) - x
    exact = 10 * torch.log10(x.double().square().sum() / noise.double().square().sum())
    assert abs(found.sqnr_db - exact.item()) < 0.1


def test_max_has_no_sqnr():
    assert run(OneByOne(), [torch.ones(1)]).ranges[0].sqnr_db is None


def test_text_has_a_line_a_quantizer():
    text = str(run(Net(), [images()], "entropy"))
    assert text.splitlines()[0] == "4 ranges, method entropy, 1 batches"
    assert text.splitlines()[1].startswith("  conv._input_quantizer   amax ")


def test_text_names_dead_channels():
    model = Net()
    with torch.no_grad():
        model.conv.weight[:2].zero_()
    assert "2 dead channels" in str(run(model, [images()]))


def test_text_of_another_method_is_new():
    calibration = run(Net(), [images()], "entropy")
    assert str(calibration.apply("max")).startswith("4 ranges, method max, 1 batches")


def test_apply_returns_the_calibration():
    calibration = run(OneByOne(), [torch.ones(1)])
    assert calibration.apply("max") is calibration


# The bar.


def test_no_bar_prints_nothing(capfd):
    run(OneByOne(), [torch.ones(1)])
    assert capfd.readouterr() == ("", "")


def test_bar_goes_to_standard_error(capfd):
    calibrate(OneByOne(), [torch.ones(1)] * 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


@pytest.mark.parametrize(("length", "num_batches", "total"), [(5, 2, "2/2"), (2, 5, "2/2")], ids=["fewer", "more"])
def test_bar_knows_its_end(capfd, length, num_batches, total):
    calibrate(OneByOne(), [torch.ones(1)] * length, num_batches=num_batches)
    assert total in capfd.readouterr().err


def held_bytes(calibration: fakequant.Calibration) -> int:
    """Return the size of every tensor that a calibration refers to."""
    seen: dict[int, int] = {}
    queue: list[object] = [calibration._calibrators]
    while queue:
        value = queue.pop()
        if isinstance(value, Tensor):
            seen[id(value)] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            queue += vars(value).values()
    assert seen, "found no tensor"
    return sum(seen.values())


# Errors name the quantizer, and a calibrator of one's own is used.


@pytest.mark.parametrize(
    ("grid", "method", "message"),
    [
        ({"num_bits": (4, 3)}, "entropy", "quantizer: float calibration method"),
        ({"block_size": 2, "block_axis": -1}, "mse", "quantizer: block_size"),
    ],
    ids=["float", "blocks"],
)
def test_a_grid_that_a_method_cannot_serve_is_named_before_the_data_is_read(grid, method, message):
    def data():
        raise AssertionError("read")
        yield

    with pytest.raises(InvalidValueError, match=message):
        run(OneByOne(QuantDescriptor(**grid)), data(), method)


def test_another_number_of_channels_is_named():
    with pytest.raises(CalibrationError, match="quantizer: amax shape: expected .* as in the batches before"):
        run(OneByOne(QuantDescriptor(8, axis=1)), [torch.ones(2, 3), torch.ones(2, 4)])


@pytest.fixture
def tenfold(monkeypatch):
    """A calibrator of a user's, which finds ten times the maximum."""
    monkeypatch.setattr("fakequant.calib.calibrator.CALIBRATORS", dict(CALIBRATORS))

    @register_calibrator("tenfold")
    class Tenfold(MaxCalibrator):
        def compute_range(self, method=None, *, percentile=99.99):
            found = super().compute_range(method, percentile=percentile)
            return found._replace(amax=found.amax * 10)


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_a_calibrator_of_ones_own_is_used_whatever_the_method(tenfold, method):
    model = OneByOne(QuantDescriptor(8, calib_method="tenfold"))
    run(model, [torch.tensor([2.0])], method)
    assert model.quantizer.amax == 20.0


class Twice(OneByOne):
    """Two layers that share a quantizer read the same tensor; ``write`` changes it in between."""

    def __init__(self, write=lambda x: None) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.quantizer(x)
        self.write(x)
        return self.quantizer(x)


@pytest.mark.parametrize(
    ("write", "seen"), [(lambda x: None, 4), (lambda x: x.add_(1), 8)], ids=["as it is", "written to"]
)
def test_a_tensor_that_is_met_again_counts_once(write, seen):
    model = Twice(write)
    calibration = run(model, [torch.zeros(4)], "entropy")
    assert calibration._calibrators["quantizer"].histogram.count.tolist() == [seen]


def test_a_buffer_that_is_filled_anew_counts_again():
    array = np.ones(4, np.float32)
    model, batch = OneByOne(), torch.from_numpy(array)

    def data():
        for value in (1.0, 2.0):
            array[:] = value  # torch does not see it
            yield batch

    run(model, data())
    assert model.quantizer.amax == 2.0
