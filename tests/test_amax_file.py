import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fakequant
from fakequant.amax_file import load_amax, save_amax
from fakequant.errors import CheckpointError, InvalidValueError
from fakequant.nn import QuantConv2d, QuantLinear
from fakequant.nn.walk import named_quantizers


def new_model() -> nn.Sequential:
    return nn.Sequential(QuantConv2d(2, 3, 3), nn.Flatten(), QuantLinear(3, 4))


def amaxes(model: nn.Module) -> dict[str, list[float] | None]:
    return {name: None if q.amax is None else q.amax.tolist() for name, q in named_quantizers(model)}


@pytest.fixture
def model() -> nn.Sequential:
    """Calibrated."""
    model = new_model()
    fakequant.calibrate(model, [torch.randn(4, 2, 3, 3)], progress=False)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ranges.safetensors"


def test_ranges_come_back(model, path):
    save_amax(model, path)
    load_amax(other := new_model(), path)
    assert amaxes(other) == amaxes(model)


def test_file_holds_names_and_ranges_only(model, path):
    save_amax(model, path)
    assert {name: amax.tolist() for name, amax in load_file(path).items()} == amaxes(model)


def test_path_may_be_a_str(model, path):
    save_amax(model, str(path))
    other = new_model()
    load_amax(other, str(path))
    assert amaxes(other) == amaxes(model)


def test_loading_replaces_other_ranges(model, path):
    save_amax(model, path)
    other = copy.deepcopy(model)
    other[2].input_quantizer.amax = 99.0
    load_amax(other, path)
    assert amaxes(other) == amaxes(model)


def test_loaded_ranges_do_not_share_memory_with_each_other(model, path):
    save_amax(model, path)
    load_amax(one := new_model(), path)
    load_amax(two := new_model(), path)
    one[2].input_quantizer.amax = 99.0
    assert two[2].input_quantizer.amax != 99


def test_saving_again_replaces_the_file(model, path):
    save_amax(model, path)
    model[2].input_quantizer.amax = 99.0
    save_amax(model, path)
    assert load_file(path)["2._input_quantizer"] == 99


def test_no_temporary_file_is_left(model, path):
    save_amax(model, path)
    assert list(path.parent.iterdir()) == [path]


def test_learned_range_is_saved(path):
    layer = QuantLinear(2, 2, quant_desc_input=fakequant.QuantDescriptor(learn_amax=True, amax=3.0))
    save_amax(layer, path)
    assert load_file(path) == {"_input_quantizer": torch.tensor(3.0)}


def test_saving_nothing_is_an_error_and_writes_nothing(path):
    with pytest.raises(CheckpointError, match="model: expected at least one calibrated quantizer, got none"):
        save_amax(new_model(), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda ranges: ranges.pop("0._input_quantizer"),
            r"no range for \['0._input_quantizer'\]; no quantizer for \[\]",
        ),
        (lambda ranges: ranges.update(head=torch.ones(())), r"no range for \[\]; no quantizer for \['head'\]"),
    ],
    ids=["missing", "unknown"],
)
def test_strict_loading_names_what_does_not_fit(model, path, changed, message):
    save_amax(model, path)
    ranges = load_file(path)
    changed(ranges)
    save_file(ranges, path)
    other = new_model()
    with pytest.raises(CheckpointError, match=message):
        load_amax(other, path)
    assert set(amaxes(other).values()) == {None}


def test_disabled_quantizer_needs_no_range(model, path):
    model[2].input_quantizer.amax = None
    save_amax(model, path)
    other = new_model()
    other[2].input_quantizer.disable()
    load_amax(other, path)
    assert not other[2].input_quantizer.is_calibrated


def test_loose_loading_sets_what_is_in_both(path):
    save_file({"0._input_quantizer": torch.tensor(2.0), "head": torch.ones(())}, path)
    model = new_model()
    load_amax(model, path, strict=False)
    assert [name for name, amax in amaxes(model).items() if amax is not None] == ["0._input_quantizer"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")], ids=str)
def test_bad_range_is_named_and_nothing_is_changed(model, path, value):
    save_amax(model, path)
    save_file(load_file(path) | {"2._input_quantizer": torch.tensor(value)}, path)
    before = amaxes(model)
    with pytest.raises(InvalidValueError, match=r"2\._input_quantizer: amax: expected finite values >= 0"):
        load_amax(model, path)
    assert amaxes(model) == before


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ranges\.safetensors: expected a safetensors file of ranges, got"):
        load_amax(new_model(), path)


def test_pickle_is_refused(model, path):
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError):
        load_amax(new_model(), path)


def test_missing_file_is_an_error(path):
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load_amax(new_model(), path)


def test_a_weight_range_of_other_channels_is_refused(tmp_path):
    model = calibrated(QuantLinear(4, 3))
    before = model.weight_quantizer.amax.clone()
    save_amax(calibrated(QuantLinear(4, 5)), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"_weight_quantizer: expected a range of shape \(3, 1\), got \(5, 1\)"):
        load_amax(model, tmp_path / "other.safetensors")
    assert torch.equal(model.weight_quantizer.amax, before)


def calibrated(layer):
    fakequant.calibrate(layer, [torch.randn(2, layer.in_features)], progress=False)
    return layer


def test_a_learned_range_that_changed_its_sign_comes_back_as_its_magnitude(path):
    grid = fakequant.QuantDescriptor(4, affine=True, learn_amax="lsq+")
    quantizer, other = fakequant.TensorQuantizer(grid), fakequant.TensorQuantizer(grid)
    quantizer.set_range(2.0, -1.0)
    with torch.no_grad():
        quantizer._amax.neg_()
        quantizer._amin.neg_()
    save_amax(quantizer, path)
    load_amax(other, path)
    assert (other.amax.item(), other.amin.item()) == (2.0, -1.0)
    assert "amax=-1.0000 to 2.0000" in repr(quantizer)
