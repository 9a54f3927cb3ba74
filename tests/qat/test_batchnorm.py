import copy
import pickle

import pytest
import torch
from torch import nn

import fakequant
from fakequant.errors import InvalidValueError
from fakequant.qat import freeze_batchnorm, unfreeze_batchnorm

CLASSES = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
# SyncBatchNorm trains on accelerators only, so the data tests leave it out.
on_cpu = pytest.mark.parametrize("d", [1, 2, 3])


def norm_and_data(d: int) -> tuple[nn.Module, torch.Tensor]:
    return getattr(nn, f"BatchNorm{d}d")(3), 5 + torch.randn(4, 3, *[6] * d)


@every_class
def test_frozen_norm_ignores_train(cls):
    assert not freeze_batchnorm(nn.Sequential(cls(3))).train()[0].training


@every_class
def test_frozen_norm_is_still_a_batch_norm(cls):
    assert isinstance(freeze_batchnorm(cls(3)), cls)


@every_class
def test_unfreeze_gives_torchs_class_back(cls):
    assert type(unfreeze_batchnorm(freeze_batchnorm(cls(3)))) is cls


@every_class
def test_unfrozen_norm_follows_train(cls):
    assert unfreeze_batchnorm(freeze_batchnorm(nn.Sequential(cls(3)))).train()[0].training


@on_cpu
def test_running_statistics_do_not_move(d):
    norm, x = norm_and_data(d)
    freeze_batchnorm(norm).train()(x)
    assert (norm.running_mean.tolist(), norm.num_batches_tracked) == ([0, 0, 0], 0)


@on_cpu
def test_output_in_training_is_that_of_eval(d):
    norm, x = norm_and_data(d)
    expected = norm.eval()(x)
    assert torch.equal(freeze_batchnorm(norm).train()(x), expected)


@on_cpu
def test_weight_and_bias_go_on_training(d):
    norm, x = norm_and_data(d)
    freeze_batchnorm(norm).train()(x).square().sum().backward()
    assert norm.weight.grad.abs().min() > 0
    assert norm.bias.grad.abs().min() > 0


@on_cpu
def test_unfrozen_statistics_move_again(d):
    norm, x = norm_and_data(d)
    unfreeze_batchnorm(freeze_batchnorm(norm)).train()(x)
    assert norm.running_mean.min() > 0


def test_freeze_works_in_place_and_returns_the_model():
    model = nn.Sequential(nn.BatchNorm2d(3))
    norm = model[0]
    assert freeze_batchnorm(model) is model
    assert model[0] is norm


def test_state_dict_keys_stay():
    model = nn.Sequential(nn.BatchNorm2d(3))
    keys = list(model.state_dict())
    assert list(freeze_batchnorm(model).state_dict()) == keys


def test_freezing_twice_is_harmless():
    norm = nn.BatchNorm2d(3)
    assert type(unfreeze_batchnorm(freeze_batchnorm(freeze_batchnorm(norm)))) is nn.BatchNorm2d


def test_other_layers_train():
    model = freeze_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.GroupNorm(1, 3))).train()
    assert [module.training for module in model] == [False, True, True]


def test_subclass_with_its_own_forward_is_left_alone_with_a_warning():
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Mine(3), Mine(3, track_running_stats=False))
    with pytest.warns(UserWarning, match="^1: expected batch norms of torch's own classes, got Mine"):
        freeze_batchnorm(model)
    assert [type(norm) for norm in model[1:]] == [Mine, Mine]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_stays_frozen(copied):
    assert not copied(freeze_batchnorm(nn.BatchNorm2d(3))).train().training


def test_a_batch_norm_with_a_quantizer_is_refused_by_name():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    fakequant.quantize(model, fakequant.preset("int8") + fakequant.Rule("1", type="BatchNorm1d"))
    with pytest.raises(InvalidValueError, match="1: expected a batch norm without quantizers, got QuantBatchNorm1d"):
        freeze_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
