import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fakequant
from fakequant.amax_file import load_amax, save_amax
from fakequant.errors import CheckpointError, InvalidTypeError, InvalidValueError
from fakequant.nn import QuantConv2d, QuantLinear
from fakequant.nn.walk import named_quantizers
from fakequant.qat import fold_batchnorm


def new_model() -> nn.Sequential:
    return nn.Sequential(QuantConv2d(2, 3, 3), nn.Flatten(), QuantLinear(3, 4))


HEADER = {"format": "fakequant.amax", "folded": "{}"}


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
    save_file(ranges, path, HEADER)
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
    save_file({"0._input_quantizer": torch.tensor(2.0), "head": torch.ones(())}, path, HEADER)
    model = new_model()
    load_amax(model, path, strict=False)
    assert [name for name, amax in amaxes(model).items() if amax is not None] == ["0._input_quantizer"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")], ids=str)
def test_bad_range_is_named_and_nothing_is_changed(model, path, value):
    save_amax(model, path)
    save_file(load_file(path) | {"2._input_quantizer": torch.tensor(value)}, path, HEADER)
    before = amaxes(model)
    with pytest.raises(InvalidValueError, match=r"2\._input_quantizer: amax: expected finite values >= 0"):
        load_amax(model, path)
    assert amaxes(model) == before


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ranges\.safetensors: expected a file of save_amax, got"):
        load_amax(new_model(), path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "expected a file of save_amax, got the format None"),
        (
            HEADER | {"format": "fakequant.quantized"},
            "expected a file of save_amax, got the format 'fakequant.quantized'",
        ),
        ({"format": "fakequant.amax"}, "folded: expected JSON"),
        (HEADER | {"folded": "[]"}, "folded: expected an object, got list"),
    ],
    ids=["none", "another format", "no folded", "a list"],
)
def test_a_header_of_another_kind_is_refused(model, path, header, message):
    save_amax(model, path)
    save_file(load_file(path), path, header)
    refused(new_model(), path, message)


def refused(model, path, message, **options):
    """Check that a file is refused with a message, and that it changed nothing."""
    before = amaxes(model)
    with pytest.raises(CheckpointError, match=message):
        load_amax(model, path, **options)
    assert amaxes(model) == before


def test_loose_loading_needs_a_name_in_common(path):
    save_file({"module.0._input_quantizer": torch.ones(())}, path, HEADER)
    message = r"expected a range for a quantizer of the model, got ranges for \['module.0._input_quantizer'\]"
    refused(new_model(), path, message, strict=False)


@pytest.mark.parametrize("name", ["0._input_quantizer", "0._weight_quantizer"])
def test_a_range_whose_shape_does_not_fit_is_refused(model, path, name):
    save_amax(model, path)
    save_file(load_file(path) | {name: torch.ones(4)}, path, HEADER)
    refused(model, path, rf"{name}: expected a range .*, got \(4,\)")


# Models that are no place for ranges.


@pytest.mark.parametrize("action", [save_amax, load_amax])
def test_a_wrapper_is_refused(model, path, action):
    expected = "model: expected the model itself, got AveragedModel around it; give its .module instead"
    with pytest.raises(InvalidTypeError, match=expected):
        action(AveragedModel(model), path)


@pytest.mark.parametrize("action", [save_amax, load_amax])
@pytest.mark.parametrize("other", [None, "x"])
def test_no_model_is_refused(path, action, other):
    with pytest.raises(InvalidTypeError, match="model: expected an nn.Module, got"):
        action(other, path)


@pytest.mark.parametrize("action", [save_amax, load_amax])
def test_a_model_on_meta_is_refused(model, path, action):
    save_amax(model, path)
    with pytest.raises(CheckpointError, match=r"tensors with values, got none, as on meta, for \['0._input_quantizer'"):
        action(copy.deepcopy(model).to("meta"), path)


def with_norm(is_folded: bool) -> nn.Module:
    """Calibrated."""
    model, x = nn.Sequential(QuantConv2d(2, 3, 1), nn.BatchNorm2d(3)), torch.randn(2, 2, 4, 4)
    fakequant.calibrate(model, [x], progress=False)
    if is_folded:
        fold_batchnorm(model, (x,))
    return model


@pytest.mark.parametrize("is_folded", [False, True])
def test_folded_batch_norms_are_those_of_the_file(path, is_folded):
    save_amax(with_norm(is_folded), path)
    refused(with_norm(not is_folded), path, r"model: expected batch norms folded into .* they differ in \['0'\]")


def test_ranges_of_folded_layers_come_back(path):
    save_amax(saved := with_norm(is_folded=True), path)
    load_amax(other := with_norm(is_folded=True), path)
    assert amaxes(other) == amaxes(saved)


# Places to write to.


@pytest.mark.parametrize("name", ["absent/ranges.safetensors", "folder"])
def test_a_place_that_cannot_be_written(model, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: expected to write a file, got: "):
        save_amax(model, tmp_path / name)
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder"]


@pytest.mark.parametrize("path", [None, 5, True, ["x"], b"x"], ids=str)
@pytest.mark.parametrize("action", [save_amax, load_amax])
def test_a_path_that_is_none_is_refused(model, action, path):
    with pytest.raises(InvalidTypeError, match="path: expected a str or an os.PathLike, got "):
        action(model, path)


def test_another_writer_of_the_same_path_is_not_disturbed(model, path, monkeypatch):
    def write_twice(tensors, file, metadata):
        monkeypatch.undo()
        save_amax(model, path)
        save_file(tensors, file, metadata)

    monkeypatch.setattr("fakequant.tensor_file.save_file", write_twice)
    save_amax(model, path)
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_range_that_is_none_is_not_written(model, path, value):
    model[0].input_quantizer._amax.fill_(value)
    with pytest.raises(CheckpointError, match="0._input_quantizer: amax: expected finite values"):
        save_amax(model, path)
    assert not path.exists()


def test_pickle_is_refused(model, path):
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError):
        load_amax(new_model(), path)


def test_missing_file_is_an_error(path):
    with pytest.raises(CheckpointError, match="expected a file of save_amax"):
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
