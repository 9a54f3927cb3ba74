"""Which batch norms are folded, and that a folded model is an ordinary one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fakequant as fq
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.export.folded_weights import folded_weights
from fakequant.nn.modules.folded_layers import folded_pairs
from fakequant.qat import (
    fold_batchnorm,
    freeze_batchnorm,
    reestimate_weights,
    start_lsq_plus,
    unfold_batchnorm,
    unfreeze_batchnorm,
)


class Blocks(nn.Module):
    """A residual block as networks have them: names say what is called when, the order of children does not."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + x)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[False, True], ids=["layers", "placed"])
def model(request) -> nn.Module:
    """A calibrated model, with call sites or without."""
    model = Blocks()
    recipe = fq.preset("int8") + fq.Rule(type="Conv2d", force=True)
    if request.param:
        recipe = recipe + fq.Rule(type="add", force=True)
    fq.quantize(model, recipe, example_inputs=X if request.param else None)
    fq.calibrate(model, [X], progress=False)
    return model


@pytest.fixture
def folded(model) -> nn.Module:
    fold_batchnorm(model, X)
    return model


# Which.


def test_pairs_are_seen_in_the_forward_pass(model):
    report = fold_batchnorm(model, X)
    assert (report.folded, report.left) == ({"conv1": "bn1", "conv2": "bn2"}, {})


def test_the_batch_may_be_a_dict_or_a_tuple(model):
    assert fold_batchnorm(copy.deepcopy(model), {"x": X}).folded == fold_batchnorm(model, (X,)).folded


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bn2.running_var", float("nan"), "bn2: expected finite values, got NaN or Inf in its running_var"),
        ("bn2.running_var", -1.0, "bn2: expected a running_var of at least 0, got -1.0"),
        ("bn2.bias", float("inf"), "bn2: expected finite values, got NaN or Inf in its bias"),
        ("conv2.weight", float("nan"), "bn2: expected finite values, got NaN or Inf in its weight of the layer"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_is_folded(model, key, value, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.state_dict()[key].fill_(value)
    with pytest.raises(InvalidValueError, match=message):
        fold_batchnorm(model, X)
    assert not folded_pairs(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name != key)


def test_folding_twice_changes_nothing(folded):
    classes = [type(module) for module in folded.modules()]
    assert fold_batchnorm(folded, X).folded == {"conv1": "bn1", "conv2": "bn2"}
    assert [type(module) for module in folded.modules()] == classes


def test_looking_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    expected = model.eval()(X)
    model.train()
    fold_batchnorm(model, X)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "quantizer" not in key)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=1e-5)


def another_reader(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def returned(m, x):
    y = m.conv(x)
    return m.norm(y), y


def called_twice(m, x):
    return m.norm(m.conv(x)) + m.conv(x)


def norm_called_twice(m, x):
    return m.norm(m.norm(m.conv(x)))


def not_called(m, x):
    return m.conv(x)


def something_between(m, x):
    return m.norm(F.relu(m.conv(x)))


def a_function(m, x):
    return m.norm(F.conv2d(x, m.conv.weight))


REASONS = {
    another_reader: "the output of conv has another reader",
    returned: "the output of conv has another reader",
    called_twice: "conv is called 2 times in the example forward",
    norm_called_twice: "it is called 2 times in the example forward",
    not_called: "it is called 0 times in the example forward",
    something_between: "its input is not the output of a convolution or linear layer",
    a_function: "conv2d_0 is a function, which has no class to change",
}


class Pair(nn.Module):
    """A layer and a norm, called as a function says."""

    def __init__(self, call, conv=None, norm=None) -> None:
        super().__init__()
        self.call = call
        self.conv = nn.Conv2d(3, 4, 3) if conv is None else conv
        self.norm = nn.BatchNorm2d(4) if norm is None else norm

    def forward(self, x):
        return self.call(self, x)


def in_sequence(m, x):
    return m.norm(m.conv(x))


def why(model: nn.Module, x: torch.Tensor = X) -> str:
    """Return the reason that the one norm of a model stays, after checking that it does."""
    report = fold_batchnorm(model, x)
    assert report.folded == {}
    (reason,) = report.left.values()
    assert f"norm: {reason}" in str(report)
    return reason


@pytest.mark.parametrize("call", REASONS, ids=lambda call: call.__name__)
def test_a_pair_that_cannot_fold_is_named_with_its_reason(call):
    model = Pair(call)
    fq.quantize(model)
    assert why(model) == REASONS[call]


def test_a_float_layer_is_left():
    model = Pair(in_sequence)
    fq.quantize(model, fq.preset("int8") + fq.Rule("conv", input=None, weight=None))
    fq.dequantize(model.conv)
    assert why(model) == "conv (Conv2d) is not quantized, or is of a class of its own"


def test_a_norm_without_running_statistics_is_left():
    model = Pair(in_sequence, norm=nn.BatchNorm2d(4, track_running_stats=False))
    fq.quantize(model)
    assert why(model) == "it has no running statistics"


def test_a_norm_with_a_quantized_input_is_left():
    model = Pair(in_sequence)
    fq.quantize(model, fq.preset("int8") + fq.Rule("norm", type="BatchNorm2d"))
    assert why(model) == "its input is quantized"


def test_a_norm_of_a_users_own_class_is_left():
    class Mine(nn.BatchNorm2d):
        pass

    model = Pair(in_sequence, norm=Mine(4))
    fq.quantize(model)
    assert why(model) == "Mine is no class of torch, and may have its own forward"


def test_a_norm_of_another_axis_than_the_channels_is_left():
    model = Pair(in_sequence, nn.Linear(6, 5), nn.BatchNorm1d(4))
    fq.quantize(model)
    reason = "the channels of conv are not on axis 1 of its output of shape (2, 4, 5)"
    assert why(model, torch.rand(2, 4, 6)) == reason


def test_a_weight_that_shares_its_range_is_left():
    model = nn.ModuleDict({"first": nn.Conv2d(3, 3, 3, padding=1), "conv": nn.Conv2d(3, 3, 3, padding=1)})
    model["norm"] = nn.BatchNorm2d(3)
    model["conv"].weight = model["first"].weight
    whole = Pair(lambda m, x: m.norm(m.conv(m.first(x))))
    whole.first, whole.conv, whole.norm = model["first"], model["conv"], model["norm"]
    fq.quantize(whole, fq.preset("int8") + fq.Rule(type="Conv2d", force=True), example_inputs=X)
    assert why(whole) == "the range of the weight of conv is shared with another layer"


@pytest.mark.parametrize("grid", [fq.QuantDescriptor(8, amax=1.0), fq.QuantDescriptor(1, scheme="bnn")], ids=str)
def test_a_weight_without_a_range_of_its_own_is_left(grid):
    model = Pair(in_sequence)
    fq.quantize(model, fq.preset("int8") + fq.Rule("conv", weight=grid))
    assert why(model).startswith("the weight of conv has a fixed range, or none: ")


def test_sync_batch_norm_folds():
    model = Pair(in_sequence, norm=nn.SyncBatchNorm(4))
    fq.quantize(model)
    expected = model.eval()(X)
    assert fold_batchnorm(model, X).folded == {"conv": "norm"}
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)


def test_another_kind_of_batch_is_an_error(model):
    with pytest.raises(InvalidTypeError, match="batch: expected a tensor"):
        fold_batchnorm(model, "x")


# An ordinary model.


def test_names_in_the_state_dict_stay(model):
    names = list(model.state_dict())
    fold_batchnorm(model, X)
    assert list(model.state_dict()) == names


def test_a_float_checkpoint_loads_strictly(folded):
    stored = Blocks().state_dict()
    folded.load_state_dict(stored, strict=True)
    assert torch.equal(folded.conv1.weight, stored["conv1.weight"])


def test_parameters_stay_the_same_and_are_there_once(model):
    before = list(model.parameters())
    fold_batchnorm(model, X)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_refers_to_its_own_norm(folded, copied):
    other = copied(folded)
    assert other.conv1.norm is other.bn1
    assert torch.equal(other.eval()(X), folded.eval()(X))


def test_an_average_of_weights_follows(folded):
    average = AveragedModel(folded)
    folded.train()(X)
    with torch.no_grad():
        folded.bn1.weight.mul_(2)
    average.update_parameters(folded)
    assert average.module.conv1.norm is average.module.bn1
    assert torch.equal(average.module.bn1.weight, folded.bn1.weight)


def test_every_parameter_trains(folded):
    before = copy.deepcopy(dict(folded.named_parameters()))
    optimizer = torch.optim.SGD(folded.parameters(), lr=0.1)
    folded.train()(X).square().mul(torch.linspace(-1, 1, 6)).sum().backward()
    optimizer.step()
    moved = {name for name, parameter in folded.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == set(before)


def test_data_parallel_training_is_that_of_the_module(folded, process_group):
    alone = copy.deepcopy(folded).train()
    alone(X).square().sum().backward()
    DistributedDataParallel(folded.train())(X).square().sum().backward()
    for mine, its in zip(folded.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


def test_a_norm_that_is_sharded_apart_from_its_layer_is_an_error(folded, process_group):
    fully_shard(folded.conv1)
    fully_shard(folded.bn1)
    with pytest.raises(InvalidValueError, match="expected a batch norm in the same group of fully_shard"):
        folded.train()(X)


def test_a_sharded_pair_trains_as_a_whole_one(folded, process_group):
    whole = copy.deepcopy(folded).train()
    fully_shard([folded.conv1, folded.bn1])
    fully_shard(folded)
    loss, expected = (model.train()(X).square().sum() for model in (folded, whole))
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for mine, its in zip(folded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(getattr(mine.grad, "full_tensor", lambda grad=mine.grad: grad)(), its.grad)


def test_a_sharded_folded_weight_is_gathered_for_its_range(folded, process_group):
    folded.conv1.weight.data.mul_(2)
    expected = folded.conv1.folded_weight().detach().abs().amax((1, 2, 3), keepdim=True)
    fully_shard(folded)
    reestimate_weights(folded)
    assert torch.equal(folded.conv1.weight_quantizer.amax, expected)


# Its modes.


def test_the_norm_returns_its_input_in_eval_mode(folded):
    y = torch.randn(2, 4, 3, 3)
    assert folded.eval().bn1(y) is y


def test_a_frozen_pair_trains_as_it_infers(folded):
    expected = folded.eval()(X)
    statistics = folded.bn1.running_mean.clone()
    assert torch.equal(freeze_batchnorm(folded).train()(X), expected)
    assert torch.equal(folded.bn1.running_mean, statistics)


def test_unfreezing_gives_the_statistics_of_the_batch_back(folded):
    other = copy.deepcopy(folded).train()
    unfreeze_batchnorm(freeze_batchnorm(folded)).train()
    assert torch.equal(folded(X), other(X))


def test_a_frozen_model_can_be_folded(model):
    freeze_batchnorm(model)
    expected = model.train()(X)
    assert fold_batchnorm(model, X).folded == {"conv1": "bn1", "conv2": "bn2"}
    torch.testing.assert_close(model.train()(X), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("undo", [unfold_batchnorm, fq.dequantize])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["training", "frozen"])
def test_undoing_gives_the_classes_back(model, undo, is_frozen):
    plain = copy.deepcopy(model)
    fold_batchnorm(model, X)
    if is_frozen:
        freeze_batchnorm(plain)
        freeze_batchnorm(model)
    undo(model)
    if undo is fq.dequantize:
        fq.dequantize(plain)
    classes = [(name, type(module)) for name, module in plain.named_modules()]
    assert [(name, type(module)) for name, module in model.named_modules()] == classes
    assert vars(model.conv1).keys() == vars(plain.conv1).keys()


# What reads a weight.


def test_lsq_plus_starts_from_the_folded_weight():
    grid = fq.QuantDescriptor(4, learn_amax="lsq")
    model = Blocks()
    fq.quantize(model, fq.preset("int8") + fq.Rule(type="Conv2d", weight=grid))
    nn.init.constant_(model.bn1.weight, 10.0)
    fold_batchnorm(model, X)
    plain = copy.deepcopy(model)
    start_lsq_plus(model)
    start_lsq_plus(unfold_batchnorm(plain))
    assert model.conv1.weight_quantizer.amax.item() == pytest.approx(
        10 * plain.conv1.weight_quantizer.amax.item(), rel=1e-3
    )


def test_integer_state_has_the_weight_and_the_bias_of_eval_mode(folded):
    state = fq.integer_state(folded)
    with folded_weights(folded):
        expected = folded.conv2.weight_quantizer(folded.conv2.weight), folded.conv2.bias
    weight, bias = state["conv2.weight"], state["conv2.bias"]
    torch.testing.assert_close(weight.codes * weight.scale, expected[0].detach())
    assert float((bias.codes * bias.scale - expected[1]).abs().max()) <= float(bias.scale.max())


# Pairs that were torn apart.


@pytest.mark.parametrize("use", [folded_pairs, lambda model: fold_batchnorm(model, X)], ids=["pairs", "fold"])
@pytest.mark.parametrize(
    ("name", "other"), [("bn1", nn.BatchNorm2d(4)), ("conv1", nn.Conv2d(3, 4, 3, padding=1))], ids=["norm", "layer"]
)
def test_a_replaced_half_is_an_error(folded, name, other, use):
    setattr(folded, name, other)
    with pytest.raises(InvalidValueError, match=f"{'bn1' if name == 'conv1' else 'conv1'}: expected the"):
        use(folded)
