"""A battery of every kind of grid that a quantizer may have."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from fakequant.arithmetic import Codes, values_on
from fakequant.calib import calibrator_for
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CalibrationError, InvalidValueError
from fakequant.nn import TensorQuantizer

GRIDS = {
    "affine": QuantDescriptor(8, affine=True),
    "affine-uint8": QuantDescriptor(8, affine=True, unsigned=True),
    "affine-channels": QuantDescriptor(8, affine=True, axis=0),
    "affine-4bit": QuantDescriptor(4, affine=True, unsigned=True),
    "affine-blocks": QuantDescriptor(4, affine=True, unsigned=True, block_size=16),
    "dynamic": QuantDescriptor(8, dynamic=True),
    "dynamic-affine": QuantDescriptor(8, dynamic=True, affine=True, unsigned=True),
    "tokens": QuantDescriptor(8, dynamic=True, axis="tokens"),
    "int4-blocks": QuantDescriptor(4, block_size=32),
    "int4-blocks-axis0": QuantDescriptor(4, block_size=2, block_axis=0),
    "lsq": QuantDescriptor(4, learn_amax="lsq"),
    "lsq-channels": QuantDescriptor(4, learn_amax="lsq", axis=0),
    "lsq+": QuantDescriptor(4, learn_amax="lsq+", affine=True, unsigned=True),
    "pact": QuantDescriptor(4, learn_amax="pact"),
    "power-of-two": QuantDescriptor(8, scale_format="power_of_two"),
    "e5m2": QuantDescriptor((5, 2)),
    "fp4": QuantDescriptor((2, 1)),
    "mxfp8": QuantDescriptor((4, 3), block_size=32, scale_format="e8m0", dynamic=True),
    "mxint8": QuantDescriptor(8, block_size=32, scale_format="e8m0", dynamic=True),
    "nvfp4": QuantDescriptor((2, 1), block_size=16, scale_format="e4m3", dynamic=True),
    "int16": QuantDescriptor(16),
    "twn": QuantDescriptor(2, scheme="twn", axis=0),
    "bnn": QuantDescriptor(1, scheme="bnn"),
    "xnor": QuantDescriptor(1, scheme="xnor", axis=0),
    "dorefa": QuantDescriptor(3, scheme="dorefa"),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
integer_grids = pytest.mark.parametrize("grid", [g for g in GRIDS.values() if not g.is_float], ids=str)
DATA = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))


def calibrated(grid: QuantDescriptor, data: torch.Tensor = DATA) -> TensorQuantizer:
    quantizer = TensorQuantizer(grid)
    if quantizer.needs_range:
        quantizer.enable_calib()
        quantizer(data)
        quantizer.disable_calib()
        quantizer.load_calib_amax()
    return quantizer


@every_grid
def test_what_comes_out_is_on_the_grid(grid):
    once = calibrated(grid)(DATA)
    if grid.scheme == "uniform" and not grid.dynamic:
        assert torch.equal(calibrated(grid)(once), once)
    assert once.shape == DATA.shape


@integer_grids
def test_codes_and_scale_give_the_values(grid):
    quantizer = calibrated(grid)
    held = Codes(*(None if part is None else part.detach() for part in quantizer.codes_of(DATA)))
    codes, (low, high) = held.codes, quantizer.bounds
    assert ((codes >= low) & (codes <= high) & (codes == codes.round())).all()
    assert torch.equal(values_on(grid, held), quantizer(DATA).detach())


@every_grid
def test_state_goes_through_a_checkpoint(grid):
    quantizer, other = calibrated(grid), TensorQuantizer(grid)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(DATA), quantizer(DATA))


@every_grid
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"])
def test_a_copy_computes_the_same(grid, duplicate):
    quantizer = calibrated(grid)
    assert torch.equal(duplicate(quantizer)(DATA), quantizer(DATA))


@every_grid
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gives_the_float32_result_rounded(grid, dtype):
    quantizer, x = calibrated(grid), DATA.to(dtype)
    result = quantizer.to(dtype)(x)
    assert result.dtype == dtype
    assert torch.equal(result, quantizer(x.float()).to(dtype))


@every_grid
def test_gradient_reaches_what_lies_within_the_range(grid):
    quantizer, x = calibrated(grid), DATA.clone().requires_grad_()
    quantizer(x).backward(torch.ones_like(x))
    inside = (DATA.abs() < 0.5) & (DATA.abs() > 1e-3)
    assert x.grad[inside].gt(0).all()


@every_grid
def test_it_compiles_without_a_graph_break(grid):
    torch.compiler.reset()  # each grid is another specialization of one function, of which torch allows eight
    quantizer = calibrated(grid)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(DATA), quantizer(DATA))


@every_grid
def test_off_is_the_identity(grid):
    quantizer = calibrated(grid)
    quantizer.disable_quant()
    assert quantizer(DATA) is DATA


def test_an_affine_range_is_two_buffers():
    quantizer = TensorQuantizer(GRIDS["affine"])
    assert list(quantizer.state_dict()) == ["_amax", "_amin"]
    assert quantizer.amin is quantizer.zero_point is None
    quantizer.set_range(3.0, -1.0)
    assert (quantizer.amax, quantizer.amin) == (3.0, -1.0)


def test_an_affine_grid_uses_all_codes_of_a_one_sided_range():
    quantizer = TensorQuantizer(GRIDS["affine-uint8"])
    quantizer.set_range(25.5, 0.0)
    assert float(quantizer.scale) == pytest.approx(0.1)
    assert quantizer.zero_point == 0


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((1.0,), "amin: expected the lower end of an affine grid, got None"),
        ((1.0, 0.5), "amin: expected finite values <= 0"),
        ((-1.0, -2.0), "amax: expected finite values >= 0"),
        (([1.0, 2.0], -1.0), r"amin: expected shape \(2,\), got \(\)"),
    ],
    ids=str,
)
def test_a_bad_affine_range_is_refused(ends, message):
    with pytest.raises(InvalidValueError, match=message):
        TensorQuantizer(GRIDS["affine"]).set_range(*ends)


@pytest.mark.parametrize("learned", [False, True])
def test_a_range_of_the_same_shape_is_replaced_in_place(learned):
    quantizer = TensorQuantizer(QuantDescriptor(axis=0, learn_amax="lsq" if learned else False))
    quantizer.set_range([1.0, 2.0])
    tensor = quantizer.amax
    quantizer.replace_range([3.0, 4.0])
    assert quantizer.amax is tensor
    assert tensor.tolist() == [3.0, 4.0]


def test_a_range_of_another_shape_replaces_the_tensor():
    quantizer = TensorQuantizer(GRIDS["affine"])
    quantizer.set_range(1.0, -1.0)
    quantizer.replace_range([3.0, 4.0], [-1.0, 0.0])
    assert (quantizer.amax.tolist(), quantizer.amin.tolist()) == ([3.0, 4.0], [-1.0, 0.0])


def test_a_symmetric_grid_has_no_lower_end():
    with pytest.raises(InvalidValueError, match="amin: expected None on a symmetric grid, got -1.0"):
        TensorQuantizer().set_range(1.0, -1.0)


@pytest.mark.parametrize(("key", "value"), [("_amin", 1.0), ("_amin", float("nan")), ("_amax", -1.0)])
def test_a_checkpoint_with_a_bad_end_is_refused(key, value):
    state = {"_amax": torch.tensor(1.0), "_amin": torch.tensor(-1.0), key: torch.tensor(value)}
    with pytest.raises(RuntimeError, match=rf"{key}: expected finite values [<>]= 0, got"):
        TensorQuantizer(GRIDS["affine"]).load_state_dict(state)


@pytest.mark.parametrize("fields", [{"affine": True}, {"block_size": 16}, {"learn_amax": "lsq"}], ids=str)
def test_what_decides_about_the_state_is_fixed_at_construction(fields):
    with pytest.raises(InvalidValueError, match=f"{next(iter(fields))}: expected .* as at construction"):
        TensorQuantizer().descriptor = QuantDescriptor(**fields)


def test_a_dynamic_grid_follows_each_call():
    quantizer = TensorQuantizer(GRIDS["dynamic-affine"])
    for factor in (1.0, 100.0):
        x = factor * DATA
        step = factor * float(DATA.max() - DATA.min()) / 255
        assert ((quantizer(x) - x).abs() <= 1.001 * step).all()
    assert not quantizer.is_calibrated


def test_each_token_has_its_own_range():
    x = DATA.reshape(2, 2, 70) * torch.tensor([1.0, 1000.0])[:, None]
    expected = torch.stack([TensorQuantizer(GRIDS["dynamic"])(row) for row in x.reshape(4, 70)])
    assert torch.equal(TensorQuantizer(GRIDS["tokens"])(x), expected.reshape(x.shape))


def test_power_of_two_scales_are_powers_of_two():
    scale = calibrated(GRIDS["power-of-two"]).scale
    assert np.log2(float(scale)).is_integer()


def test_a_dynamic_grid_is_not_calibrated():
    quantizer = TensorQuantizer(GRIDS["dynamic"])
    assert not quantizer.needs_range
    with pytest.raises(CalibrationError):
        quantizer.load_calib_amax()


def test_calibrators_know_the_whole_grid():
    assert calibrator_for(GRIDS["affine-channels"]).descriptor == GRIDS["affine-channels"]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InvalidValueError, match=r"scheme: expected one of \['bnn', .*\], got 'sbnn'"):
        TensorQuantizer(QuantDescriptor(2, scheme="sbnn"))
