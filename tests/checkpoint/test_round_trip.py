"""A float model and a file give the model that was saved, in everything that it is and does."""

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fakequant as fq
from fakequant.call_sites import CallSite, CallSites, PerCall

OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
NOT_SAVED = frozenset({"_calibrator", "reported", "_learning", "_moves"})
"""Collected statistics; warnings that were given; a pause in learning that is over; moves since the last backward."""

SWITCHES = frozenset({"_disabled", "_if_quant", "_if_calib", "stands_by"})


def anatomy(model: nn.Module):
    """Every module under every name: its class, attributes that are no tensors, and hooks; and which are one object."""
    first = {module: name for name, module in model.named_modules()}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {
            key: first[value] if isinstance(value, nn.Module) else value
            for key, value in vars(module).items()
            if key not in OF_TORCH | NOT_SAVED and not key.startswith("_flat_weight")
        }
        attributes |= {key: p.requires_grad for key, p in module._parameters.items() if p is not None}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        counts = len(module._forward_hooks_always_called)
        found[name] = type(module), attributes, hooks, counts, first[module]
    return found


def state(model):
    return [(key, value.dtype, value.tolist()) for key, value in model.state_dict().items()]


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def trained(model, x, optimizer=None):
    """Return the outputs and gradients of two steps, and the state after them."""
    torch.manual_seed(1)
    model.train()
    optimizer = optimizer or adam(model)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        gradients = [(name, None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()]
        seen.append((y.tolist(), gradients))
        optimizer.step()
    return seen, state(model)


@pytest.fixture
def loaded(path):
    """Save a model, and load it into a float one with other weights."""

    def load(case, model):
        fq.save_quantized(model, path)
        return fq.load_quantized(case.float_model(seed=1).train(model.training), path)

    return load


def test_it_is_the_same_in_every_module(case, loaded):
    model = case.model()
    assert anatomy(loaded(case, model)) == anatomy(model)


def test_it_has_the_same_state_in_the_same_order(case, loaded):
    model = case.model()
    other = loaded(case, model)
    assert state(other) == state(model)
    assert [(name, p.requires_grad) for name, p in other.named_parameters()] == [
        (name, p.requires_grad) for name, p in model.named_parameters()
    ]


def test_it_computes_and_trains_bit_identically(case, loaded):
    model, x = case.model(), case.batch()
    other = loaded(case, model)
    if not model.training:
        assert torch.equal(other(x), model(x))
    assert trained(other, x) == trained(model, x)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_it_becomes_the_same_for_each_target(case, target, loaded):
    model = case.model()
    other = loaded(case, model)
    for each in (model, other):
        fq.retarget(each, target)
    assert anatomy(other) == anatomy(model)


@pytest.mark.parametrize("name", ["in training", "learned", "learned, placed"])
def test_training_goes_on_bit_identically_with_the_optimizers_state(saved_models, name, loaded):
    case = saved_models.CASES[name]
    model, x = case.model(), case.batch()
    optimizer = adam(model)
    trained(model, x, optimizer)
    other = loaded(case, model)
    resumed = adam(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(other, x, resumed) == trained(model, x, optimizer)


def test_a_manifest_in_the_checkpoint_of_a_trainer_is_enough(case):
    model, x = case.model(), case.batch()
    file = io.BytesIO()
    torch.save({"quantization": fq.manifest_of(model), "model": model.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other = fq.quantize_like(case.float_model(seed=1), checkpoint["quantization"])
    other.load_state_dict(checkpoint["model"], strict=True)
    for each in (model, other):
        each.eval()
    assert torch.equal(other(x), model(x))


def test_a_manifest_is_json(case):
    manifest = fq.manifest_of(case.model())
    assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest


@pytest.mark.parametrize(
    ("added", "saved"),
    [
        (
            fq.TensorQuantizer(),
            {*SWITCHES, "range_keys", "is_weight", "saves_memory", "momentum", "grids", "_descriptor"},
        ),
        (CallSite("add"), {"kind", "weights", "targets", "stand_by"}),
        (CallSites("", {}), {"owner", "seen", "counts_calls", "kinds"}),
        (PerCall("slot", []), {"slot"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_there_is_no_attribute_that_a_manifest_forgets(added, saved):
    # A new one belongs into the manifest; into one of the two sets here only if it need not be there.
    follows = {"_scheme", "_dynamic_scale"}
    assert set(vars(added)) - OF_TORCH - NOT_SAVED - follows - {"training"} == saved


@pytest.mark.parametrize(("given", "saved"), [("patched", "placed"), ("placed", "patched")])
def test_a_model_may_be_built_quantized_or_not(saved_models, given, saved, loaded):
    model = saved_models.CASES[saved].model()
    assert anatomy(loaded(saved_models.CASES[given], model)) == anatomy(model)


def test_a_loaded_model_can_be_loaded_again(saved_models, loaded, path):
    case = saved_models.CASES["placed"]
    model = case.model()
    other = loaded(case, model)
    model.twice.conv.input_quantizer.of_call(None).amax = 7.0
    fq.save_quantized(model, path)
    fq.load_quantized(other, path)
    assert anatomy(other) == anatomy(model)
    assert state(other) == state(model)


def test_a_loaded_model_becomes_the_float_one_again(saved_models, loaded):
    case = saved_models.CASES["placed"]
    float_model = case.float_model()
    assert anatomy(fq.dequantize(loaded(case, case.model()))) == anatomy(float_model)


def test_loading_returns_the_model_itself_with_its_own_parameters(saved_models, path):
    case = saved_models.CASES["placed"]
    fq.save_quantized(case.model(), path)
    model = case.float_model()
    modules, parameters = [*model.modules()], [*model.parameters()]
    assert fq.load_quantized(model, path) is model
    assert all(module in [*model.modules()] for module in modules)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_that_of_the_model_given(saved_models, path, mode):
    case = saved_models.CASES["placed"]
    fq.save_quantized(case.model().train(not mode), path)
    model = fq.load_quantized(case.float_model().train(mode), path)
    assert {module.training for module in model.modules()} == {mode}


def test_quantizers_are_where_the_model_is(saved_models):
    case = saved_models.CASES["placed"]
    model = fq.quantize_like(case.float_model().to("meta"), fq.manifest_of(case.model()))
    assert {quantizer._amax.device.type for _, quantizer in fq.nn.walk.named_quantizers(model)} == {"meta"}


def test_ranges_stay_float32_in_a_bfloat16_model(saved_models, path):
    case = saved_models.CASES["placed"]
    model, x = case.model().bfloat16(), case.batch().bfloat16()
    fq.save_quantized(model, path)
    other = fq.load_quantized(case.float_model(seed=1).bfloat16(), path)
    assert torch.equal(other(x), model(x))
    assert {q.amax.dtype for _, q in fq.nn.walk.named_quantizers(other)} == {torch.float32}


def test_tied_weights_are_stored_once_and_stay_tied(saved_models, loaded, path):
    case = saved_models.CASES["transformer"]
    model = loaded(case, case.model())
    assert model.head.weight is model.embedding.weight
    assert len({"head.weight", "embedding.weight"} & set(load_file(path))) == 1


def test_views_of_one_memory_are_saved(saved_models, path):
    case = saved_models.CASES["by hand"]
    model, x = case.model(), case.batch()
    model.conv.bias.data = model.first.bias.data[:]
    fq.save_quantized(model, path)
    assert torch.equal(fq.load_quantized(case.float_model(), path)(x), model(x))


def test_the_file_has_no_more_than_state(saved_models, loaded, path):
    case = saved_models.CASES["placed"]
    model = case.model()
    loaded(case, model)
    assert set(load_file(path)) <= set(model.state_dict())


def test_loading_takes_no_random_numbers(saved_models, path):
    case = saved_models.CASES["placed"]
    fq.save_quantized(case.model(), path)
    model = case.float_model()
    before = torch.get_rng_state()
    fq.load_quantized(model, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_of_a_loaded_model_is_like_it(saved_models, loaded):
    case = saved_models.CASES["placed"]
    model = loaded(case, case.model())
    assert anatomy(copy.deepcopy(model)) == anatomy(model)
