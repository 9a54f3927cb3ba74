"""A model with call sites is an ordinary model: copied, saved, loaded, cast, printed, made float again."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import fakequant as fq
from fakequant.call_sites import call_sites
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers


@pytest.fixture
def net(models, quantized):
    """Shared quantizers, one a call, and sites in two modules and in the model itself."""
    return quantized(models.net())


def through_a_file(content, **options):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, **options)


def reloaded(net, models, quantized):
    other = quantized(models.net(), calibrate=False)
    other.load_state_dict(through_a_file(net.state_dict(), weights_only=True), strict=True)
    return other


COPIES = {
    "deepcopy": lambda net, *_: copy.deepcopy(net),
    "deepcopy of a copy": lambda net, *_: copy.deepcopy(copy.deepcopy(net)),
    "pickle": lambda net, *_: pickle.loads(pickle.dumps(net)),
    "whole model in a file": lambda net, *_: through_a_file(net, weights_only=False),
    "strict state_dict": reloaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_gives_the_same(copied, net, models, quantized, batch):
    assert torch.equal(copied(net, models, quantized)(batch), net(batch))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_quantizers_of_its_own(copied, net, models, quantized):
    other = copied(net, models, quantized)
    assert not {q for _, q in named_quantizers(other)} & {q for _, q in named_quantizers(net)}
    assert [name for name, _ in named_quantizers(other)] == [name for name, _ in named_quantizers(net)]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_what_is_shared_is_shared_in_a_copy(copied, net, models, quantized):
    other = copied(net, models, quantized)
    skip = dict(call_sites(other))["block1.add_0"]._modules["other"]
    assert skip is other.block1.conv1.input_quantizer


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_trains_like_the_original(copied, net, models, quantized, batch):
    other = copied(net, models, quantized)
    for model in (net, other):
        model.train()
        model(batch).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in other.named_parameters())


def test_a_pickle_opens_in_a_process_that_never_quantized(net, batch, tmp_path, models):
    torch.save((net, batch, net(batch)), tmp_path / "net.pt")
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location({models.__name__!r}, {str(Path(models.__file__))!r})\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"net, x, y = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        "assert torch.equal(net(x), y)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_state_dict_is_torchs_and_a_range_a_quantizer(net, models):
    added = set(net.state_dict()) - set(models.net().state_dict())
    assert added == {f"{name}._amax" for name, _ in named_quantizers(net)}


def test_a_shared_range_is_in_the_state_once_so_that_safetensors_takes_it(net):
    names = [name for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, TensorQuantizer)]
    state = net.state_dict()
    assert len(names) > sum(name.endswith("._amax") for name in state)
    assert load(save(state)).keys() == state.keys()


def test_a_state_with_a_shared_range_under_every_name_loads(net, models):
    names = [name for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, TensorQuantizer)]
    doubled = {f"{name}._amax": net.get_submodule(name).amax * 2 for name in names}
    net.load_state_dict(net.state_dict() | doubled, strict=True)
    assert all(torch.equal(net.get_submodule(name).amax, doubled[f"{name}._amax"]) for name in names)


def test_a_float_state_dict_loads_strictly_and_leaves_the_ranges(net, models):
    before = {name: quantizer.amax.clone() for name, quantizer in named_quantizers(net)}
    state = {name: tensor + 1 for name, tensor in models.net().state_dict().items()}
    net.load_state_dict(state, strict=True)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(quantizer.amax, before[name]) for name, quantizer in named_quantizers(net))


def test_quantizers_off_is_bit_identical_to_the_float_model(net, models, batch):
    for _, quantizer in named_quantizers(net):
        quantizer.disable()
    assert torch.equal(net(batch), models.net()(batch))


def test_gradients_with_quantizers_off_are_the_float_models(net, models, batch):
    for _, quantizer in named_quantizers(net):
        quantizer.disable()
    gradients = []
    for model in (net.train(), models.net().train()):
        model(batch).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])


def test_dequantize_gives_the_float_model_back(net, models, batch):
    expected = models.net()
    fq.dequantize(net)
    assert [type(module) for module in net.modules()] == [type(module) for module in expected.modules()]
    assert list(net.state_dict()) == list(expected.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in net.modules())
    assert torch.equal(net(batch), expected(batch))


def test_identity_of_modules_and_parameters_survives(models, quantized):
    model = models.net()
    modules, parameters = [*model.modules()], [*model.parameters()]
    quantized(model)
    assert [m for m in model.modules() if m in modules] == modules
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_an_owner_still_is_an_instance_of_its_class(net, models):
    assert isinstance(net.block1, models.Block)
    assert type(net.block1).__name__ == "Block"
    assert type(net.block1).__qualname__ == "Block"


def test_printing_shows_the_quantizers_of_a_site(net):
    assert "(add_0): CallSite(" in str(net)
    assert "(other): TensorQuantizer(" in str(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_of_the_output_is_that_of_the_model(net, batch, dtype):
    assert net.to(dtype)(batch.to(dtype)).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ranges_stay_float32(net, dtype):
    net.to(dtype)
    assert {quantizer.amax.dtype for _, quantizer in named_quantizers(net)} == {torch.float32}


def test_apply_and_requires_grad_see_no_more_parameters(net, models):
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in models.net().named_parameters()]


def test_a_part_of_the_model_may_be_replaced(net, batch):
    net.fc = nn.Identity()
    assert net(batch).shape == (2, 16)


def test_an_attribute_set_on_an_owner_is_kept_through_pickle(net):
    net.block1.note = "kept"
    assert pickle.loads(pickle.dumps(net)).block1.note == "kept"
