"""Models that do not fit a file, or that no file can hold, are refused by name, and nothing is changed."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fakequant as fq
from fakequant.errors import CheckpointError, InvalidTypeError, InvalidValueError


def remove(model):
    del model.up


def add(model):
    model.more = nn.ReLU()


def set_(name, module):
    return lambda model: setattr(model, name, module)


def cut_alias(model):
    model.again = nn.BatchNorm2d(16)


def other_alias(model):
    model.again = model.twice.bn


def quantizer_of_its_own(model):
    model.fc.skip_quantizer = fq.TensorQuantizer()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remove, r"model.safetensors: model: expected the 11 modules of the saved one, got none for \['up'\]"),
        (add, r"got none for \[\], and \['more'\] besides"),
        (set_("fc", nn.Conv1d(16, 16, 1)), "fc: expected Linear, got Conv1d"),
        (set_("fc", nn.Linear(16, 8)), r"fc.weight: expected \(\(16, 16\), torch.float32\) .* got \(\(8, 16\)"),
        (set_("fc", nn.Linear(16, 16, bias=False)), r"state of the model, got no \[\], and \['fc.bias'\] besides"),
        (nn.Module.bfloat16, r"expected .*torch.float32\) in the model, as saved, got .*torch.bfloat16"),
        (lambda model: model.to("meta"), r"expected tensors with values, got none, as on meta, for \['small.weight'"),
        (cut_alias, r"got none for \[\], and \['again'\] besides"),
        (other_alias, "expected modules with several names {'again': 'once.bn'}, got {'again': 'twice.bn'}"),
        (quantizer_of_its_own, r"expected the quantizers of the saved one, got \['fc.skip_quantizer'\] besides"),
    ],
)
def test_another_model(placed, path, change, match, refuses):
    fq.save_quantized(placed.model(), path)
    model = placed.float_model()
    change(model)
    refuses(model, match)


def test_a_range_that_does_not_fit_its_weight_is_not_written(path):
    model = nn.Sequential(nn.Linear(4, 3))
    fq.quantize(model)
    model[0].weight_quantizer.set_range([[1.0], [1.0]])
    with pytest.raises(CheckpointError, match=r"0._weight_quantizer: amax: expected shape \(3, 1\)"):
        fq.save_quantized(model, path)
    assert not path.exists()


@pytest.mark.parametrize(
    "value", [float("nan"), -1.0, [1.0, 1.0]], ids=["not a number", "negative", "two on a per-tensor grid"]
)
def test_a_range_of_activations_that_is_none_is_not_written(path, value):
    model = nn.Sequential(nn.Linear(4, 3))
    fq.quantize(model)
    model[0].input_quantizer._amax = torch.tensor(value)
    with pytest.raises(CheckpointError, match="^0._input_quantizer: amax: expected "):
        fq.save_quantized(model, path)
    assert not path.exists()


@pytest.mark.parametrize("path", [None, 5, True, ["x"], b"x"], ids=str)
@pytest.mark.parametrize("action", [fq.save_quantized, fq.load_quantized])
def test_a_path_that_is_none_is_refused(placed, action, path):
    with pytest.raises(InvalidTypeError, match="path: expected a str or an os.PathLike, got "):
        action(placed.model(), path)


def test_a_tie_that_is_lost(saved_models, path, refuses):
    case = saved_models.CASES["transformer"]
    fq.save_quantized(case.model(), path)
    model = case.float_model()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    refuses(model, "another tie for .*'head.weight', 'embedding.weight'")


def test_a_tie_too_many(saved_models, path, refuses):
    case = saved_models.CASES["by hand"]
    fq.save_quantized(case.model(), path)
    model = case.float_model()
    model.conv.bias = model.first.bias
    refuses(model, "another tie for .*'first.bias', 'conv.bias'")


def test_a_model_that_is_quantized_stays_as_it_is_after_an_error(placed, saved_models, path, refuses):
    fq.save_quantized(saved_models.CASES["by hand"].model(), path)
    refuses(placed.model(), "expected the 3 modules")


def test_a_folded_model(placed, saved_models, path, refuses):
    fq.save_quantized(placed.model(), path)
    refuses(saved_models.CASES["in training"].model(), "once.conv: .* call unfold_batchnorm first")


# Wrappers, on both ways.


@pytest.mark.parametrize(
    ("wrapper", "attribute"),
    [
        pytest.param(nn.DataParallel, "module", id="DataParallel"),
        pytest.param(AveragedModel, "module", id="AveragedModel"),
        pytest.param(torch.compile, "_orig_mod", id="OptimizedModule", marks=pytest.mark.slow),
    ],
)
def test_a_wrapper_is_refused_and_what_it_wraps_is_not(placed, path, wrapper, attribute):
    wrapped = wrapper(placed.model())
    expected = f"expected the model itself, got {type(wrapped).__name__} around it; give its .{attribute} instead"
    with pytest.raises(InvalidTypeError, match=expected):
        fq.save_quantized(wrapped, path)
    fq.save_quantized(getattr(wrapped, attribute), path)
    with pytest.raises(InvalidTypeError, match=expected):
        fq.load_quantized(wrapper(placed.float_model()), path)
    fq.load_quantized(placed.float_model(), path)


def test_distributed_data_parallel_is_refused(placed, path, process_group):
    wrapped = nn.parallel.DistributedDataParallel(placed.model())
    with pytest.raises(InvalidTypeError, match="got DistributedDataParallel around it; give its .module instead"):
        fq.save_quantized(wrapped, path)


@pytest.mark.parametrize("model", [{}, fq.TensorQuantizer()], ids=["a dict", "a quantizer"])
def test_no_model(model, path):
    with pytest.raises(InvalidTypeError, match=f"model: expected an nn.Module.*, got {type(model).__name__}"):
        fq.save_quantized(model, path)


# Models that cannot be saved.


class Quantizer(fq.TensorQuantizer):
    pass


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"step": 1}


class Placed(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def quantized(*layers):
    model = Placed(*layers)
    fq.quantize(model)
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: Placed(nn.Linear(2, 2)), "expected a quantized model, got Placed without quantizers"),
        (lambda: Placed(Quantizer()), "layers.0: expected a TensorQuantizer, got a subclass of it, Quantizer"),
        (lambda: quantized(nn.Linear(2, 2), WithState(2, 2)), r"a state of tensors .* \['layers.1._extra_state'\]"),
        (lambda: quantized(nn.Linear(2, 2), nn.LazyLinear(2)), r"tensors with values, .* \['layers.1.weight'"),
        (lambda: quantized(nn.Linear(2, 2)).to("meta"), r"tensors with values, got others for \['layers.0.weight'"),
    ],
)
def test_a_model_that_a_file_cannot_hold(model, match, path):
    with pytest.raises(CheckpointError, match=match):
        fq.save_quantized(model(), path)
    assert not path.exists()


def test_a_folded_layer_without_its_norm(saved_models, path):
    model = saved_models.CASES["in training"].model()
    model.once.bn = model.again = nn.BatchNorm2d(16)
    with pytest.raises(InvalidValueError, match="once.conv: expected the batch norm that was folded into it"):
        fq.save_quantized(model, path)


@pytest.mark.parametrize("name", ["absent/model.safetensors", "folder"])
def test_a_place_that_cannot_be_written(placed, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: expected to write a file, got: "):
        fq.save_quantized(placed.model(), tmp_path / name)
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder"]


def test_no_temporary_file_is_left_and_an_older_file_is_replaced(placed, path):
    path.write_text("older")
    fq.save_quantized(placed.model(), path)
    fq.load_quantized(placed.float_model(), path)
    assert [*path.parent.iterdir()] == [path]


def test_a_failed_save_leaves_the_older_file(placed, path, monkeypatch):
    fq.save_quantized(placed.model(), path)
    before = path.read_bytes()

    def save_file(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("fakequant.tensor_file.save_file", save_file)
    with pytest.raises(CheckpointError, match="no space left"):
        fq.save_quantized(placed.model(), path)
    assert [*path.parent.iterdir()] == [path]
    assert path.read_bytes() == before
