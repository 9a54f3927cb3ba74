"""A quantized model is an ordinary model, in one process: what is tried on what.

==========================  ===========================================================
every network, precision    eager: loss falls, gradients and dtypes; quantizers off
every network               copies; the float model given back; quantizers off in eval mode
one precision a network     compiled in one graph, with learned ranges
two processes               see test_two_processes.py
==========================  ===========================================================
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fakequant as fq
from fakequant.nn.walk import named_quantizers

NETWORKS = ["cnn", "residual", "transformer", "lstm", "cell"]
PRECISIONS = ["float32", "float16", "bfloat16", "autocast bfloat16", "autocast float16"]
every_network = pytest.mark.parametrize("name", NETWORKS)
# torch has no LSTM in float16 on a CPU.
CELLS = [(n, p) for n in NETWORKS for p in PRECISIONS if n != "lstm" or "float16" not in p.split()]
every_cell = pytest.mark.parametrize(("name", "precision"), CELLS)


def held(networks, model: nn.Module, precision: str) -> nn.Module:
    return model.to(networks.PRECISIONS[precision][0])


def switch_off(model: nn.Module) -> nn.Module:
    for _, quantizer in named_quantizers(model):
        quantizer.disable()
    return model


def ranges(model: nn.Module) -> dict[str, list[float]]:
    return {name: quantizer.amax.tolist() for name, quantizer in named_quantizers(model)}


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@every_cell
def test_loss_falls(networks, name, precision, learned):
    model = held(networks, networks.quantized(name, learned=learned), precision)
    losses = networks.train(model, networks.data(name), precision, steps=6)
    assert losses[-1] < losses[0]


@every_cell
def test_every_parameter_in_use_gets_a_finite_gradient_of_its_dtype(networks, name, precision):
    model = held(networks, networks.quantized(name, learned=True), precision)
    networks.train(model, networks.data(name), precision, steps=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype
            assert parameter.grad.isfinite().all()


@every_cell
def test_ranges_stay_float32_and_fixed_ones_what_they_were(networks, name, precision):
    model = networks.quantized(name)
    before = ranges(model)
    networks.train(held(networks, model, precision), networks.data(name), precision, steps=2)
    assert ranges(model) == before
    assert {quantizer.amax.dtype for _, quantizer in named_quantizers(model)} == {torch.float32}


@every_cell
def test_the_output_has_the_float_models_dtype(networks, name, precision):
    models = (networks.quantized(name), networks.float_network(name))
    x, _ = networks.data(name)
    found, expected = (networks.forward(held(networks, m, precision), x, precision).dtype for m in models)
    assert found == expected


@every_cell
def test_quantizers_off_is_the_float_model_bit_for_bit(networks, name, precision):
    models = (switch_off(networks.quantized(name)), networks.float_network(name))
    losses = [networks.train(held(networks, m, precision), networks.data(name), precision, steps=2) for m in models]
    found, expected = map(networks.gradients, models)
    assert losses[0] == losses[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@every_network
def test_quantizers_off_is_the_float_model_in_eval_mode(networks, name):
    models = (switch_off(networks.quantized(name)).eval(), networks.float_network(name).eval())
    with torch.no_grad():
        assert torch.equal(*(model(networks.data(name)[0]) for model in models))


# torch.compile breaks the graph at nn.LSTM, quantized or not: see tests/nn/test_recurrent.py.
COMPILED = [
    ("cnn", "bfloat16"),
    ("residual", "autocast bfloat16"),
    ("transformer", "autocast float16"),
    ("cell", "float32"),
]


@pytest.mark.parametrize(("name", "precision"), COMPILED)
def test_compiled_trains_like_eager_without_a_graph_break(networks, name, precision):
    torch.compiler.reset()
    model = held(networks, networks.quantized(name, learned=True), precision)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    losses = [networks.train(m, networks.data(name), precision, steps=2) for m in (compiled, model)]
    # Rounding differs, so now and then an element takes the next step of its grid.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "float32" else 2e-2)


@pytest.mark.slow
def test_compiled_to_machine_code_trains_like_eager(networks):
    torch.compiler.reset()
    model = networks.quantized("residual")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    losses = [networks.train(m, networks.data("residual"), steps=2) for m in (compiled, model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def through_a_file(content, **options):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, **options)


def loaded(networks, name, model):
    other = networks.quantized(name, calibrated=False)
    other.load_state_dict(through_a_file(model.state_dict(), weights_only=True), strict=True)
    return other


COPIES = {
    "deepcopy": lambda networks, name, model: copy.deepcopy(model),
    "pickle": lambda networks, name, model: pickle.loads(pickle.dumps(model)),
    "whole model in a file": lambda networks, name, model: through_a_file(model, weights_only=False),
    "strict state_dict": loaded,
    "average of weights": lambda networks, name, model: AveragedModel(model).module,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@every_network
def test_a_copy_in_the_middle_trains_on_alike(networks, name, copied):
    model, batch = networks.quantized(name), networks.data(name)
    networks.train(model, batch, steps=1)
    other = copied(networks, name, model)
    assert networks.train(other, batch, steps=2) == networks.train(model, batch, steps=2)
    assert ranges(other) == ranges(model)


@every_network
def test_dequantize_gives_the_float_model_back(networks, name):
    model, expected = fq.dequantize(networks.quantized(name)), networks.float_network(name).train()
    batch = networks.data(name)
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    assert networks.train(model, batch, steps=2) == networks.train(expected, batch, steps=2)
    assert list(model.state_dict()) == list(expected.state_dict())
